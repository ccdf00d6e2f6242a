"""The paper's Figure 2, one file a box."""
