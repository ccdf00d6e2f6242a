// Python module segclip_fast._C: NumPy arrays in and out, no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bindings_device.h"
#include "device_info.h"
#include "felzenszwalb.h"
#include "patch_labels.h"

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

int64_t stride_of(const py::array& array, int axis, const std::string& name) {
  if (array.strides(axis) % array.itemsize() != 0)
    throw py::value_error(name + ": expected strides that are multiples of the item size");
  return array.strides(axis) / array.itemsize();
}

segclip::ImageBatch view(const py::array& images, bool planar) {
  if (images.ndim() != 4)
    throw py::value_error("images: expected 4 dimensions, got " + std::to_string(images.ndim()));
  const int row = planar ? 2 : 1, column = row + 1, channel = planar ? 1 : 3;
  const auto stride = [&](int axis) { return stride_of(images, axis, "images"); };
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
                                  int threads, bool planar, std::optional<std::vector<double>> taps,
                                  bool single) {
  const segclip::ImageBatch batch = view(images, planar);
  const segclip::FelzenszwalbParams params{scale, min_size, taps ? *taps : segclip::gaussian_taps(sigma),
                                           single};
  py::array_t<int32_t> labels({batch.batch, batch.height, batch.width});
  int32_t* out = labels.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    segclip::felzenszwalb(batch, params, threads, out);
  }
  return labels;
}

template <typename Label>
py::array_t<int64_t> patch_labels_of(const py::array_t<Label>& labels, int64_t patch, bool mean,
                                     int threads) {
  if (labels.ndim() != 3)
    throw py::value_error("labels: expected 3 dimensions, got " + std::to_string(labels.ndim()));
  if (patch < 1 || labels.shape(1) % patch != 0 || labels.shape(2) % patch != 0)
    throw py::value_error("labels: expected sides divisible by patch " + std::to_string(patch));
  segclip::LabelBatch<Label> batch;
  batch.data = labels.data();
  batch.batch = labels.shape(0), batch.batch_stride = stride_of(labels, 0, "labels");
  batch.height = labels.shape(1), batch.row_stride = stride_of(labels, 1, "labels");
  batch.width = labels.shape(2), batch.column_stride = stride_of(labels, 2, "labels");
  py::array_t<int64_t> result({batch.batch, batch.height / patch, batch.width / patch});
  int64_t* out = result.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    segclip::patch_labels(batch, patch, mean, threads, out);
  }
  return result;
}

py::array_t<int64_t> patch_labels(const py::array& labels, int64_t patch, bool mean, int threads) {
  if (py::isinstance<py::array_t<int32_t>>(labels))
    return patch_labels_of<int32_t>(py::array_t<int32_t>(labels), patch, mean, threads);
  if (py::isinstance<py::array_t<int64_t>>(labels))
    return patch_labels_of<int64_t>(py::array_t<int64_t>(labels), patch, mean, threads);
  throw py::type_error("labels: expected int32 or int64, got " + py::str(labels.dtype()).cast<std::string>());
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
        py::arg("taps") = py::none(), py::arg("single") = false,
        "Superpixels of (B, H, W, C) images, or (B, C, H, W) if planar -> (B, H, W) int32. `taps`: right "
        "half of the "
        "blur kernel to use instead of the one computed from sigma. `single`: in float32.");
  m.def("patch_labels", &patch_labels, py::arg("labels"), py::arg("patch"), py::arg("mean"),
        py::arg("threads") = 1,
        "Most frequent, or mean, label of each patch: (B, H, W) int32 or int64 -> (B, h, w) int64.");
  bind_device(m);
  m.def("cuda_build", &cuda_build, "Whether CUDA code was compiled in, and for which architectures.");
  m.def("cuda_devices", &cuda_devices, "CUDA devices and versions, or the reason why there are none.");
}
