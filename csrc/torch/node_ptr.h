// How a torch version owns its autograd nodes: std::shared_ptr in older ones, c10::intrusive_ptr in newer ones.
#pragma once

#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace fastact {

using NodePtr = decltype(torch::autograd::Edge::function);
constexpr bool kSharedNodes = std::is_same_v<NodePtr, std::shared_ptr<torch::autograd::Node>>;

// Found by argument-dependent lookup only where torch has it, so that this also compiles where it has not.
template <class N>
std::shared_ptr<N> share(N* node) {
  return std::shared_ptr<N>(node, [](auto* n) { deleteNode(n); });
}

/// A pointer to the derived node, of the kind NodePtr is.
template <class N, class... Args>
auto make_node(Args&&... args) {
  if constexpr (kSharedNodes)
    return share(new N(std::forward<Args>(args)...));
  else
    return c10::make_intrusive<N>(std::forward<Args>(args)...);
}

}  // namespace fastact
