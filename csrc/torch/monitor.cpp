// Monitors as Python has them: the counters, and which module is at work.
#include "monitor.h"

#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <set>

#include "rows.h"
#include "watch.h"

namespace py = pybind11;

namespace fastact {
namespace {

using at::Tensor;

/// Where torch.nn's activation of that name and those parameters belongs: to the row it is the twin of, or to none.
watch::Kind kind_of(const std::string& name, const std::vector<double>& parameters, std::optional<int64_t> dim) {
  static std::mutex mutex;
  static std::set<std::string> names;
  const std::lock_guard<std::mutex> lock(mutex);
  watch::Kind kind{names.insert(name).first->c_str()};
  std::copy_n(parameters.begin(), std::min<size_t>(kMaxParameters, parameters.size()), kind.parameters);
  const int softmax = softmax_named(name);
  if (dim) {
    kind.along_dim = true;
    kind.dim = *dim;
    kind.logarithms = softmax >= 0 && kSoftmaxes[softmax].logarithms;
  } else {
    const int row = row_named(name);
    if (row >= 0 && int(parameters.size()) == kRows[row].arity()) kind.row = row;
  }
  return kind;
}

py::object wrap(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

py::dict describe(const watch::Layer& l) {
  py::dict d;
  d["scope"] = l.scope;
  d["position"] = l.position;
  d["kind"] = l.kind.name;
  std::vector<double> parameters;
  if (l.kind.row >= 0) parameters.assign(l.kind.parameters, l.kind.parameters + kRows[l.kind.row].arity());
  d["parameters"] = parameters;
  d["device"] = l.device.str();
  d["chunk"] = l.chunk;
  d["offset"] = l.offset;
  d["units"] = l.units;
  d["unit_dim"] = l.unit_dim;
  d["length"] = l.length;
  d["sizes"] = std::vector<int64_t>(l.sizes, l.sizes + kSides);
  d["levels"] = py::make_tuple(l.levels.low, l.levels.high);
  d["histograms"] = wrap(l.histograms);
  d["carried"] = l.carried.defined() ? wrap(l.carried) : py::none();
  return d;
}

/// A module of the watched model, as its hooks know it. `activation`: it is one itself, so that an output that no kernel of
/// ours has made is looked at too.
struct Place {
  std::shared_ptr<watch::Monitor> monitor;
  int64_t scope;
  bool activation;
};

const Place& place_of(PyObject* capsule) { return *static_cast<Place*>(PyCapsule_GetPointer(capsule, nullptr)); }

PyObject* enter(PyObject* self, PyObject* training) {
  HANDLE_TH_ERRORS
  const Place& place = place_of(self);
  return PyBool_FromLong(place.monitor->enter(place.scope, training == Py_True));
  END_HANDLE_TH_ERRORS
}

PyObject* leave(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  const Place& place = place_of(self);
  return PyBool_FromLong(place.monitor->leave(place.scope) == 0 && place.activation);
  END_HANDLE_TH_ERRORS
}

/// The scope of a new place, and what its hooks call: enter(training), which says whether it has entered, and leave(), which
/// says whether the output is theirs to look at.
/// Built-in functions, since every forward calls both.
py::tuple add_place(const std::shared_ptr<watch::Monitor>& monitor, int64_t unit_dim, bool activation) {
  static PyMethodDef methods[] = {{"enter", enter, METH_O, nullptr}, {"leave", leave, METH_NOARGS, nullptr}};
  const int64_t scope = monitor->add_scope(unit_dim);
  const py::capsule place(new Place{monitor, scope, activation}, [](void* p) { delete static_cast<Place*>(p); });
  const auto function = [&](PyMethodDef& method) {
    return py::reinterpret_steal<py::object>(PyCFunction_New(&method, place.ptr()));
  };
  return py::make_tuple(scope, function(methods[0]), function(methods[1]));
}

}  // namespace

void define_monitor(py::module_& m) {
  using watch::Layer;
  using watch::Monitor;
  py::class_<Layer, std::shared_ptr<Layer>>(m, "Layer").def("look", [](Layer& layer, int side, py::handle x) {
    watch::look(layer, side, THPVariable_Unpack(x.ptr()));
  });
  py::class_<Monitor, std::shared_ptr<Monitor>>(m, "Monitor", "What the kernels count for one monitor of fastact.sight.")
      .def(py::init<int64_t>(), py::arg("sample"))
      .def("start", &Monitor::start)
      .def("close", &Monitor::close)
      .def("add_place", &add_place)
      .def("output",
           [](Monitor& monitor, int64_t scope, const std::string& name, const std::vector<double>& parameters,
              std::optional<int64_t> dim, std::pair<double, double> levels, py::handle y) {
             watch::Kind kind = kind_of(name, parameters, dim);
             kind.levels = {levels.first, levels.second};
             return monitor.output(scope, kind, THPVariable_Unpack(y.ptr()));
           })
      .def_property(
          "running", [](const Monitor& monitor) { return monitor.running.load(); },
          [](Monitor& monitor, bool is) { monitor.running = is; })
      .def_property(
          "recording", [](const Monitor& monitor) { return monitor.recording.load(); },
          [](Monitor& monitor, bool is) { monitor.recording = is; })
      .def_property(
          "training", [](const Monitor& monitor) { return monitor.training.load(); },
          [](Monitor& monitor, bool is) { monitor.training = is; })
      .def_property(
          "calls", [](const Monitor& monitor) { return monitor.calls.load(); },
          [](Monitor& monitor, int number) { monitor.calls = number; })
      .def_property_readonly("gradients", [](const Monitor& monitor) { return monitor.gradients.load(); })
      .def(
          "maker_of",
          [](const Monitor& monitor, py::handle y) -> int64_t {
            const Tensor& t = THPVariable_Unpack(y.ptr());
            return t.numel() > 0 && t.has_storage() && t.const_data_ptr() == monitor.last_output ? monitor.last_layer.load()
                                                                                                 : -1;
          },
          "The layer whose output this is, if it is the last one that was looked at; else -1.")
      .def("layers",
           [](Monitor& monitor) {
             const std::lock_guard<std::mutex> lock(monitor.mutex);
             py::list list;
             for (const auto& layer : monitor.layers) list.append(describe(*layer));
             return list;
           })
      .def(
          "take",
          [](Monitor& monitor) {
            const std::lock_guard<std::mutex> lock(monitor.mutex);
            py::list list;
            for (const auto& [device, chunks] : monitor.chunks)
              for (size_t k = 0; k < chunks.size(); ++k) {
                const auto& [counters, used] = chunks[k];
                if (!counters.is_cpu()) {
                  list.append(py::make_tuple(device, k, wrap(watch::to_host(chunks[k]))));
                  continue;
                }
                auto* const bytes = static_cast<char*>(counters.mutable_data_ptr());
                list.append(py::make_tuple(device, k, py::bytes(bytes, size_t(used))));
                memset(bytes, 0, size_t(used));
              }
            return list;
          },
          "The counters, which are then 0: those on the CPU as bytes, others as tensors on their way to the host.");
  m.def("monitors", [] { return watch::monitors.load(); }, "How many are open.");
  m.attr("SATURATED") = watch::kSaturated;
}

}  // namespace fastact
