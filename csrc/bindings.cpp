// Python module segclip_fast._C: NumPy arrays in and out, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "device_info.h"
#include "felzenszwalb.h"

#ifndef SEGCLIP_CUDA_ARCHITECTURES
#define SEGCLIP_CUDA_ARCHITECTURES ""
#endif

namespace py = pybind11;

namespace {

segclip::PixelType pixel_type(const py::array& images) {
  if (py::isinstance<py::array_t<uint8_t>>(images)) return segclip::PixelType::kUint8;
  if (py::isinstance<py::array_t<float>>(images)) return segclip::PixelType::kFloat32;
  if (py::isinstance<py::array_t<double>>(images)) return segclip::PixelType::kFloat64;
  throw py::type_error("images: expected uint8, float32 or float64, got " +
                       py::str(images.dtype()).cast<std::string>());
}

segclip::ImageBatch view(const py::array& images, bool planar) {
  if (images.ndim() != 4)
    throw py::value_error("images: expected 4 dimensions, got " + std::to_string(images.ndim()));
  const int row = planar ? 2 : 1, column = row + 1, channel = planar ? 1 : 3;
  const auto stride = [&](int axis) {
    if (images.strides(axis) % images.itemsize() != 0)
      throw py::value_error("images: expected strides that are multiples of the item size");
    return images.strides(axis) / images.itemsize();
  };
  segclip::ImageBatch batch;
  batch.data = images.data();
  batch.type = pixel_type(images);
  batch.batch = images.shape(0), batch.batch_stride = stride(0);
  batch.height = images.shape(row), batch.row_stride = stride(row);
  batch.width = images.shape(column), batch.column_stride = stride(column);
  batch.channels = images.shape(channel), batch.channel_stride = stride(channel);
  return batch;
}

py::array_t<int32_t> felzenszwalb(const py::array& images, double scale, double sigma, int64_t min_size,
                                  int threads, bool planar, std::optional<std::vector<double>> taps) {
  const segclip::ImageBatch batch = view(images, planar);
  const segclip::FelzenszwalbParams params{scale, min_size, taps ? *taps : segclip::gaussian_taps(sigma)};
  py::array_t<int32_t> labels({batch.batch, batch.height, batch.width});
  int32_t* out = labels.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    segclip::felzenszwalb(batch, params, threads, out);
  }
  return labels;
}

py::dict cuda_build() {
  py::dict result;
#ifdef SEGCLIP_WITH_CUDA
  result["compiled"] = true;
#else
  result["compiled"] = false;
#endif
  result["architectures"] = std::string(SEGCLIP_CUDA_ARCHITECTURES);
  return result;
}

py::dict cuda_devices() {
  const segclip::DeviceInfo info = segclip::device_info();
  py::dict result;
  result["devices"] = info.names;
  result["runtime_version"] = info.runtime_version;
  result["driver_version"] = info.driver_version;
  result["reason"] = info.reason.empty() ? py::object(py::none()) : py::object(py::str(info.reason));
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of segclip_fast.";
  m.def("felzenszwalb", &felzenszwalb, py::arg("images"), py::arg("scale"), py::arg("sigma"),
        py::arg("min_size"), py::arg("threads") = 0, py::kw_only(), py::arg("planar") = false,
        py::arg("taps") = py::none(),
        "Superpixels of (B, H, W, C) images, or (B, C, H, W) if planar -> (B, H, W) int32. `taps`: right "
        "half of the "
        "blur kernel to use instead of the one computed from sigma.");
  m.def("cuda_build", &cuda_build, "Whether CUDA code was compiled in, and for which architectures.");
  m.def("cuda_devices", &cuda_devices, "CUDA devices and versions, or the reason why there are none.");
}
