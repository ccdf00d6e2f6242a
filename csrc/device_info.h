// Which CUDA devices this build can see.
#pragma once

#include <string>
#include <vector>

namespace segclip {

struct DeviceInfo {
  std::vector<std::string> names;
  int runtime_version = 0, driver_version = 0;  // e.g. 13000; 0 when unknown
  std::string reason;                           // why there is no device; empty when there is one
};

#ifdef SEGCLIP_WITH_CUDA
DeviceInfo device_info();  // never throws for want of a driver or a device
#else
inline DeviceInfo device_info() { return {{}, 0, 0, "segclip_fast was built without CUDA"}; }
#endif

}  // namespace segclip
