// The mathematics of activations with learnable parameters, one number per channel: a functor each, then the one list of rows.
//
// A functor is a template over its lane type, as in activations.h, made of the parameters that hold for the lanes.
// `forward(x)` is the activation. `backward(dy, x, terms)` returns dx, and leaves in terms[k] what these elements add to the
// gradient of parameter k. The input is what is saved: a parameter's gradient needs it. Everything else follows from these
// lines and from the rows at the end, as it does for activations.h.
#pragma once

#include "activations.h"

namespace fastact {
namespace FASTACT_NAMESPACE {
namespace {

/// x where x > 0, else weight x.
template <class V>
struct PReLU {
  static constexpr bool costly = false;
  static constexpr int parameters = 1;
  V weight;
  FASTACT_FN explicit PReLU(const V* p) : weight(p[0]) {}
  FASTACT_FN V forward(V x) const { return select(x > V(0), x, weight * x); }
  FASTACT_FN V backward(V dy, V x, V* terms) const {
    terms[0] = select(x > V(0), V(0), x * dy);
    return select(x > V(0), dy, weight * dy);
  }
};

/// scale / (1 + exp(-slope x)).
template <class V>
struct ChannelScaledSigmoid {
  static constexpr bool costly = true;
  static constexpr int parameters = 2;
  V scale, slope;
  FASTACT_FN explicit ChannelScaledSigmoid(const V* p) : scale(p[0]), slope(p[1]) {}
  FASTACT_FN V forward(V x) const { return scale * Sigmoid<V>(nullptr).forward(slope * x); }
  // s (1 - s) as the product of the sigmoids of -|z| and |z|, so that neither loses digits to the other. Not abs(z): at 0 the
  // branch must be the one that is taken below, because higher derivatives are those of this formula.
  FASTACT_FN V backward(V dy, V x, V* terms) const {
    const V z = slope * x;
    const V e = exp_nonpositive(V(select(z > V(0), -z, z)));
    const V high = 1 / (1 + e), low = e * high;
    const V dz = (dy * scale) * (low * high);
    terms[0] = dy * select(z > V(0), high, low);
    terms[1] = dz * x;
    return dz * slope;
  }
};

}  // namespace
}  // namespace FASTACT_NAMESPACE
}  // namespace fastact

/// The one list: ROW(op, functor, names of the parameters ...).
#define FASTACT_CHANNEL_ACTIVATIONS(ROW) \
  ROW(prelu, PReLU, "weight")            \
  ROW(channel_scaled_sigmoid, ChannelScaledSigmoid, "scale", "slope")
