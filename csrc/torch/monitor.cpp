// Monitors as Python has them: the counters, and which module is at work.
#include "monitor.h"

#include <c10/util/SmallVector.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <set>
#include <unordered_map>

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

/// A module of a watched model. `activation`: it is one itself, so that an output that no kernel of ours has made is looked at
/// too.
struct Place {
  std::shared_ptr<watch::Monitor> monitor;
  watch::Scope& scope;
  bool activation;
  // Of a module that announces itself: called with it and its output, before the place is entered where a step of the other
  // mode has to end, and where the output is still to be looked at.
  py::object switched = {}, left = {};

  /// Whether an output of the module is still to be looked at.
  bool leave() const { return watch::leave(scope) == 0 && activation; }
};

// ---- Modules that have hooks -----------------------------------------------------------------------------------------------

const Place& place_of(PyObject* capsule) { return *static_cast<Place*>(PyCapsule_GetPointer(capsule, nullptr)); }

PyObject* enter(PyObject* self, PyObject* training) {
  HANDLE_TH_ERRORS
  const Place& place = place_of(self);
  return PyBool_FromLong(watch::enter(place.scope, training == Py_True, place.monitor));
  END_HANDLE_TH_ERRORS
}

PyObject* leave(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  return PyBool_FromLong(place_of(self).leave());
  END_HANDLE_TH_ERRORS
}

/// What the hooks of a module call: enter(training), which says whether it has entered, and leave(), which says whether the
/// output is theirs to look at. Built-in functions, since every forward calls both.
py::tuple make_hooks(const std::shared_ptr<watch::Monitor>& monitor, int64_t scope, bool activation) {
  static PyMethodDef methods[] = {{"enter", enter, METH_O, nullptr}, {"leave", leave, METH_NOARGS, nullptr}};
  const py::capsule place(new Place{monitor, monitor->scope(scope), activation},
                          [](void* p) { delete static_cast<Place*>(p); });
  const auto function = [&](PyMethodDef& method) {
    return py::reinterpret_steal<py::object>(PyCFunction_New(&method, place.ptr()));
  };
  return py::make_tuple(function(methods[0]), function(methods[1]));
}

// ---- Modules that announce themselves --------------------------------------------------------------------------------------

using Places = c10::SmallVector<std::shared_ptr<const Place>, 1>;

/// Several hold them, under the GIL, which spares counts that all cores have to agree on.
py::capsule kept(Places places) {
  return py::capsule(new Places(std::move(places)), [](void* p) { delete static_cast<Places*>(p); });
}
Places& places_in(const py::capsule& kept) { return *static_cast<Places*>(PyCapsule_GetPointer(kept.ptr(), nullptr)); }

/// By the module, and by the dict of its forward hooks: what is a shallow copy of the module, such as a replica of
/// DataParallel, has the same, and no deep copy has.
struct Announced {
  py::object alive;  // a weak reference to the key
  py::capsule places;
};
using AllAnnounced = std::unordered_map<PyObject*, Announced>;
AllAnnounced& announced() {
  static auto* const all = new AllAnnounced;  // it outlives the interpreter
  return *all;
}

py::object attribute(PyObject* object, PyObject* name) {
  py::object value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, name));
  if (!value) throw python_error();
  return value;
}
py::object hooks_of(PyObject* module) {
  static PyObject* const name = PyUnicode_InternFromString("_forward_hooks");
  return attribute(module, name);
}
bool training(PyObject* module) {
  static PyObject* const name = PyUnicode_InternFromString("training");
  return attribute(module, name).ptr() == Py_True;
}
bool is_of(const Announced& entry, PyObject* key) { return PyWeakref_GetObject(entry.alive.ptr()) == key; }

py::capsule places_of(PyObject* module) {
  static const auto* const none = new py::capsule(kept({}));
  auto entry = announced().find(module);
  if (entry != announced().end() && is_of(entry->second, module)) return entry->second.places;
  const py::object hooks = hooks_of(module);
  entry = announced().find(hooks.ptr());
  return entry != announced().end() && is_of(entry->second, hooks.ptr()) ? entry->second.places : *none;
}

void announce(const std::shared_ptr<watch::Monitor>& monitor, int64_t scope, bool activation, py::handle module,
              py::object switched, py::object left) {
  const std::shared_ptr<const Place> place(
      new Place{monitor, monitor->scope(scope), activation, std::move(switched), std::move(left)});
  for (const py::object& key : {py::reinterpret_borrow<py::object>(module), hooks_of(module.ptr())}) {
    // Where Python makes an object it may run code, such as the end of a monitor, which forgets: so the entries come after.
    Announced now{py::weakref(key), kept({})};
    auto& places = places_in(now.places);
    const auto before = announced().find(key.ptr());
    if (before != announced().end() && is_of(before->second, key.ptr())) places = places_in(before->second.places);
    places.push_back(place);
    std::swap(announced()[key.ptr()], now);
  }
}

/// Those of a monitor are forgotten.
void forget(const std::shared_ptr<watch::Monitor>& monitor) {
  std::vector<py::capsule> before;  // whose Python objects may run code when they go
  for (auto entry = announced().begin(); entry != announced().end();) {
    py::capsule& all = entry->second.places;
    Places others;
    for (const auto& place : places_in(all))
      if (place->monitor != monitor) others.push_back(place);
    const bool none = others.empty();
    before.push_back(std::exchange(all, kept(std::move(others))));
    entry = none ? announced().erase(entry) : std::next(entry);
  }
}

/// Leaves those places that were entered, also where an exception comes.
struct Entered {
  const Places& places;
  size_t number = 0;
  bool leave() { return places[--number]->leave(); }
  ~Entered() {
    while (number > 0) leave();
  }
};

/// at_work(forward, module, input): the result of forward(module, input), in the module's places.
PyObject* at_work(PyObject*, PyObject* const* args, Py_ssize_t) {
  HANDLE_TH_ERRORS
  PyObject* const module = args[1];
  const py::capsule held = places_of(module);
  Entered entered{places_in(held)};
  for (const auto& place : entered.places) {
    const bool within = place->monitor->state->calls > 0;  // a call of the model, which says in which mode it is
    ++entered.number;
    if (!watch::enter(place->scope, within || training(module))) place->switched(py::handle(module), py::none());
  }
  const py::object y = py::reinterpret_steal<py::object>(PyObject_Vectorcall(args[0], args + 1, 2, nullptr));
  if (!y) return nullptr;
  for (auto place = entered.places.rbegin(); place != entered.places.rend(); ++place)
    if (entered.leave()) (*place)->left(py::handle(module), py::none(), y);
  return Py_NewRef(y.ptr());
  END_HANDLE_TH_ERRORS
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
      .def("add_scope", [](Monitor& monitor, int64_t unit_dim) { return monitor.add_scope(unit_dim).number; })
      .def("enter", [](const std::shared_ptr<Monitor>& monitor, int64_t scope,
                       bool training) { return watch::enter(monitor->scope(scope), training, monitor); })
      .def("hooks", &make_hooks, "enter(training) and leave() of a module of that scope, for its hooks.")
      .def("announce", &announce, "Counts what at_work() is told of the module for that scope.")
      .def("forget", &forget)
      .def("output",
           [](Monitor& monitor, int64_t scope, const std::string& name, const std::vector<double>& parameters,
              std::optional<int64_t> dim, std::pair<double, double> levels, py::handle y) {
             watch::Kind kind = kind_of(name, parameters, dim);
             kind.levels = {levels.first, levels.second};
             return watch::output(monitor.scope(scope), kind, THPVariable_Unpack(y.ptr()));
           })
      .def_property(
          "running", [](const Monitor& monitor) { return monitor.state->running.load(); },
          [](Monitor& monitor, bool is) { monitor.state->running = is; })
      .def_property(
          "recording", [](const Monitor& monitor) { return monitor.state->recording.load(); },
          [](Monitor& monitor, bool is) { monitor.state->recording = is; })
      .def_property(
          "training", [](const Monitor& monitor) { return monitor.state->training.load(); },
          [](Monitor& monitor, bool is) { monitor.state->training = is; })
      .def_property(
          "owing", [](const Monitor& monitor) { return monitor.state->owing.load(); },
          [](Monitor& monitor, bool is) { monitor.state->owing = is; })
      .def_property(
          "calls", [](const Monitor& monitor) { return monitor.state->calls.load(); },
          [](Monitor& monitor, int number) { monitor.state->calls = number; })
      .def_property_readonly("gradients", [](const Monitor& monitor) { return monitor.state->gradients.load(); })
      .def(
          "maker_of",
          [](const Monitor& monitor, py::handle y) -> int64_t {
            const Tensor& t = THPVariable_Unpack(y.ptr());
            return t.numel() > 0 && t.has_storage() && t.const_data_ptr() == monitor.state->last_output
                       ? monitor.state->last_layer.load()
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
  static PyMethodDef method = {"at_work", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(at_work)), METH_FASTCALL,
                               "at_work(forward, module, input): forward(module, input), counted for the module."};
  m.attr("at_work") = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
  m.def("monitors", [] { return watch::monitors.load(); }, "How many are open.");
  m.attr("SATURATED") = watch::kSaturated;
  m.attr("AUTO") = Look::kAuto;
  m.attr("ALL") = Look::kAll;
  m.attr("MOST_SAMPLED") = Look::sample_of(Look::kAuto, std::numeric_limits<int64_t>::max());
}

}  // namespace fastact
