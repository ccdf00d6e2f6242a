#include "bindings_device.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "felzenszwalb_cuda.h"
#include "felzenszwalb_emulated.h"
#include "patch_labels_cuda.h"
#include "patch_labels_device.h"

namespace py = pybind11;

namespace {

using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // (B, C, H, W)

segclip::PixelType pixel_type(const std::string& name) {
  if (name == "uint8") return segclip::PixelType::kUint8;
  if (name == "float32") return segclip::PixelType::kFloat32;
  if (name == "float64") return segclip::PixelType::kFloat64;
  throw py::type_error("images: expected uint8, float32 or float64, got " + name);
}

segclip::ImageBatch view(const void* data, const std::string& type, const Shape& shape,
                         const Shape& strides) {
  segclip::ImageBatch batch;
  batch.data = data;
  batch.type = pixel_type(type);
  std::tie(batch.batch, batch.channels, batch.height, batch.width) = shape;
  std::tie(batch.batch_stride, batch.channel_stride, batch.row_stride, batch.column_stride) = strides;
  return batch;
}

py::dict as_dict(const segclip::device::Counts& c) {
  py::dict result;
#define FIELD(name) result[#name] = c.name
  FIELD(edges), FIELD(united), FIELD(batches), FIELD(filter_steps), FIELD(survivors), FIELD(exchanges),
      FIELD(stages);
  FIELD(large_exchanges), FIELD(rounds), FIELD(round_steps), FIELD(merges), FIELD(rejected), FIELD(rest);
  FIELD(small_rounds), FIELD(small_visits);
#undef FIELD
  return result;
}

py::tuple felzenszwalb_emulated(const py::array& images, double scale, int64_t min_size,
                                std::vector<double> taps, bool single, int warps, bool reversed,
                                bool parents_shared) {
  if (images.ndim() != 4 || !(images.flags() & py::array::c_style))
    throw py::value_error("images: expected a contiguous (B, C, H, W)");
  const Shape shape{images.shape(0), images.shape(1), images.shape(2), images.shape(3)};
  const int64_t plane = images.shape(2) * images.shape(3);
  const auto batch = view(images.data(), py::str(images.dtype()).cast<std::string>(), shape,
                          {images.shape(1) * plane, plane, images.shape(3), 1});
  segclip::FelzenszwalbParams params{scale, min_size, std::move(taps)};
  params.single_precision = single;
  py::array_t<int32_t> labels({images.shape(0), images.shape(2), images.shape(3)});
  std::vector<segclip::device::Counts> counts(images.shape(0));
  int32_t* out = labels.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    segclip::felzenszwalb_emulated(batch, params, {warps, reversed, parents_shared}, out, counts.data());
  }
  py::list all;
  for (const auto& c : counts) all.append(as_dict(c));
  return py::make_tuple(labels, all);
}

py::array_t<int64_t> patch_labels_emulated(const py::array_t<int32_t, py::array::c_style>& labels,
                                           int64_t patch, bool mean, bool reversed) {
  const int64_t batch = labels.shape(0), rows = labels.shape(1) / patch, columns = labels.shape(2) / patch;
  py::array_t<int64_t> out({batch, rows, columns});
  const segclip::device::PatchProblem<int32_t> problem{labels.data(),
                                                       out.mutable_data(),
                                                       static_cast<uint32_t>(labels.shape(1)),
                                                       static_cast<uint32_t>(labels.shape(2)),
                                                       static_cast<uint32_t>(patch),
                                                       mean};
  for (int64_t i = 0; i < batch * rows * columns; ++i)
    segclip::device::label_patch(segclip::parallel::Warp{reversed}, problem, i);
  return out;
}

#ifdef SEGCLIP_WITH_CUDA

struct Request {
  segclip::ImageBatch batch;
  segclip::FelzenszwalbParams params;
};

Request request(uintptr_t data, const std::string& type, const Shape& shape, const Shape& strides,
                double scale, int64_t min_size, std::vector<double> taps, bool single) {
  Request r{view(reinterpret_cast<const void*>(data), type, shape, strides),
            {scale, min_size, std::move(taps)}};
  r.params.single_precision = single;
  return r;
}

void bind_cuda(py::module_& m) {
  py::class_<Request>(
      m, "CudaFelzenszwalb",
      "Superpixels of (B, C, H, W) images in GPU memory: pointer, dtype's name, shape, strides.")
      .def(py::init(&request), py::arg("data"), py::arg("dtype"), py::arg("shape"), py::arg("strides"),
           py::arg("scale"), py::arg("min_size"), py::arg("taps"), py::arg("single"))
      .def(
          "workspace_bytes",
          [](const Request& r, int64_t images) {
            return segclip::felzenszwalb_cuda_bytes(r.batch, r.params, images);
          },
          py::arg("images"), "Workspace that lets this many images run at a time.")
      .def(
          "run",
          [](const Request& r, uintptr_t labels, uintptr_t workspace, size_t bytes, int device,
             uintptr_t stream) {
            const py::gil_scoped_release unlocked;
            segclip::felzenszwalb_cuda(r.batch, r.params, reinterpret_cast<int32_t*>(labels),
                                       reinterpret_cast<void*>(workspace), bytes, device,
                                       reinterpret_cast<void*>(stream));
          },
          py::arg("labels"), py::arg("workspace"), py::arg("workspace_bytes"), py::arg("device"),
          py::arg("stream"), "Queues the work on a stream; labels is (B, H, W) int32.");
  m.def(
      "patch_labels_cuda",
      [](uintptr_t labels, bool wide, std::tuple<int64_t, int64_t, int64_t> shape, int64_t patch, bool mean,
         uintptr_t out, int device, uintptr_t stream) {
        const auto [batch, height, width] = shape;
        segclip::patch_labels_cuda(reinterpret_cast<const void*>(labels), wide, batch, height, width, patch,
                                   mean, reinterpret_cast<int64_t*>(out), device,
                                   reinterpret_cast<void*>(stream));
      },
      py::arg("labels"), py::arg("wide"), py::arg("shape"), py::arg("patch"), py::arg("mean"), py::arg("out"),
      py::arg("device"), py::arg("stream"),
      "One label per patch of contiguous int32 (or wide: int64) label maps.");
}

#else

void bind_cuda(py::module_&) {}

#endif

}  // namespace

void bind_device(py::module_& m) {
  bind_cuda(m);
  m.def("felzenszwalb_emulated", &felzenszwalb_emulated, py::arg("images"), py::arg("scale"),
        py::arg("min_size"), py::arg("taps"), py::kw_only(), py::arg("single") = false, py::arg("warps") = 1,
        py::arg("reversed") = false, py::arg("parents_shared") = true,
        "The CUDA implementation run on the CPU, for tests: labels (B, H, W) int32 of contiguous (B, C, H, "
        "W) images, "
        "and what was done for each image.");
  m.def("patch_labels_emulated", &patch_labels_emulated, py::arg("labels"), py::arg("patch"), py::arg("mean"),
        py::arg("reversed") = false, "The CUDA implementation of patch labels run on the CPU, for tests.");
}
