"""From stored measurements to the tables of the README and docs/performance.md."""
