// A CUDA runtime for machines without a GPU: what runs on the device it plays are tasks of the host.
#pragma once

#include <functional>

namespace stand_in {

/// Puts a task behind what the stream still has to do, or into the graph that it captures. It runs at once where the stream
/// waits for nothing.
void submit(void* stream, std::function<void()> task);

/// Whether a task would have to wait.
bool busy(void* stream);

/// Runs a task when all is done that the stream still had to do, as if the host had taken long to come here. That is no
/// synchronisation. Throws while a graph is captured.
void run_now(void* stream, const std::function<void()>& task);

}  // namespace stand_in
