// A CUDA device that the processor plays: tensors of type "cuda", in memory of their own, for tests.
//
// Operators run on the processor, at once, by torch's own CPU kernels; what they are given and what they return is
// memory of the device, and a tensor of the host among their arguments is an error, as it is on a real device. Copies are
// as late as those of a real one: on a stream that is not the default one they run on a thread of that stream, and a copy
// down that does not block arrives later, with the bytes of when it was given. Events order streams. Memory that is freed
// is overwritten at once.
//
// Because operators run at once, what comes too early for them shows in no value. So order itself is kept, as vector
// clocks: each stream knows how far it is ordered behind every other, by events and by the host's waiting, and two uses of
// the same bytes by two streams, one of them a write, that nothing orders are an error.
#include <pthread.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include "memory.h"

namespace {

using Clock = std::chrono::steady_clock;

double now_s() { return std::chrono::duration<double>(Clock::now().time_since_epoch()).count(); }

// ---- memory ----

thread_local int64_t current_stream = 0;

constexpr size_t workspace_bytes = size_t(32) << 20;  // of cuBLAS, on Hopper; 8 MiB elsewhere

Memory& memory() {
  static auto* instance = new Memory;
  return *instance;
}

void release(void* address);

c10::DataPtr allocated(size_t num_bytes);

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    return allocated(num_bytes);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t count) const override {
    std::memcpy(target, source, count);
  }
};

DeviceAllocator device_allocator;

// Host memory that copies may read and write late.
struct Pinned {
  std::mutex lock;
  std::map<const char*, size_t> ranges;

  void add(const void* address, size_t num_bytes) {
    std::lock_guard<std::mutex> guard(lock);
    ranges[static_cast<const char*>(address)] = num_bytes;
  }
  bool remove(const void* address) {
    std::lock_guard<std::mutex> guard(lock);
    return ranges.erase(static_cast<const char*>(address)) == 1;
  }
  bool overlaps(const void* address, size_t num_bytes) {
    std::lock_guard<std::mutex> guard(lock);
    auto begin = static_cast<const char*>(address);
    for (auto& [first, size] : ranges)
      if (first < begin + num_bytes && begin < first + size) return true;
    return false;
  }
  const char* begin_of(const void* data) {
    std::lock_guard<std::mutex> guard(lock);
    auto next = ranges.upper_bound(static_cast<const char*>(data));
    if (next == ranges.begin()) return nullptr;
    --next;
    return static_cast<const char*>(data) < next->first + next->second ? next->first : nullptr;
  }
  bool holds(const void* data) { return begin_of(data) != nullptr; }
};

Pinned& pinned() {
  static auto* instance = new Pinned;
  return *instance;
}

// ---- order ----

using Known = std::map<int64_t, int64_t>;  // by stream, how much of it is known to be over

void join(Known& known, const Known& other) {
  for (auto& [stream, count] : other) known[stream] = std::max(known[stream], count);
}

struct Use {
  const char *begin, *end;
  int64_t stream, count;
  bool writes;
  std::string by;
};

// Who used which bytes, and what of it is over for whom. The host's threads are one: what one of them waited for is over
// for all.
struct Order {
  std::mutex lock;
  std::map<int64_t, Known> streams;
  Known host;
  std::map<const char*, std::vector<Use>> uses;  // by the begin of the memory that the bytes are part of
  struct Freed {
    const char* end;
    int64_t count;
  };
  std::map<const char*, Freed> freed;
  std::string race;

  void start(int64_t stream) {  // something more is given to a stream
    join(streams[stream], host);
    ++streams[stream][stream];
  }

  void check(const Use& next, const char* memory) {
    auto& clock = streams[next.stream];
    auto& known = uses[memory];
    for (auto& use : known) {
      const bool overlap = use.begin < next.end && next.begin < use.end;
      if (!overlap || !(use.writes || next.writes) || clock[use.stream] >= use.count) continue;
      if (race.empty())
        race = "a race on the device: " + next.by + " on stream " + std::to_string(next.stream) + " and " + use.by +
               " on stream " + std::to_string(use.stream) + " use the same bytes, and nothing orders them";
    }
    if (!race.empty()) return;
    std::erase_if(known, [&](const Use& use) {
      return use.stream == next.stream && use.writes <= next.writes && next.begin <= use.begin && use.end <= next.end;
    });
    known.push_back(next);
  }

  // The computing stream gives memory back, which it may use again at once, and other streams when they are behind it.
  void give_back(const char* memory, const char* end) {
    std::lock_guard<std::mutex> guard(lock);
    join(streams[0], host);
    for (auto& use : uses[memory])
      if (use.stream != 0 && streams[0][use.stream] < use.count && race.empty())
        race = "a race on the device: memory is given back while " + use.by + " on stream " +
               std::to_string(use.stream) + " uses it";
    uses.erase(memory);
    freed[memory] = {end, streams[0][0]};
  }

  // What is taken may still be in use by those that had it before, as far as the computing stream knows.
  void take(const char* memory, const char* end) {
    std::lock_guard<std::mutex> guard(lock);
    auto range = freed.upper_bound(memory);
    if (range != freed.begin() && std::prev(range)->second.end > memory) --range;
    while (range != freed.end() && range->first < end) {
      const auto [begin, last] = *range;
      range = freed.erase(range);
      if (begin < memory) freed[begin] = {memory, last.count};
      if (end < last.end) freed[end] = last;
      uses[memory].push_back({std::max(begin, memory), std::min(last.end, end), 0, last.count, true, "its last owner"});
    }
  }

  void forget(const char* memory) {
    std::lock_guard<std::mutex> guard(lock);
    uses.erase(memory);
  }
};

Order& order() {
  static auto* instance = new Order;
  return *instance;
}

void release(void* address) {
  auto begin = static_cast<char*>(address);
  order().give_back(begin, begin + memory().size_of(begin));
  memory().give(begin);
}

c10::DataPtr allocated(size_t num_bytes) {
  char* address = num_bytes == 0 ? nullptr : memory().take(num_bytes, current_stream);
  if (address != nullptr) order().take(address, address + memory().size_of(address));
  return {address, address, &release, c10::Device(c10::kCUDA, 0)};
}

// The bytes that the elements of a tensor lie in.
std::pair<const char*, const char*> bytes_of(const at::Tensor& tensor) {
  auto begin = static_cast<const char*>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return {begin, begin + (last + 1) * tensor.itemsize()};
}

struct Touch {
  const at::Tensor* tensor;
  bool writes;
};

// A stream is given what uses these tensors; those of the host count where they are pinned.
void uses(int64_t stream, const std::vector<Touch>& touches, const std::string& by) {
  std::lock_guard<std::mutex> guard(order().lock);
  order().start(stream);
  const int64_t count = order().streams[stream][stream];
  for (auto& [tensor, writes] : touches) {
    if (!tensor->defined() || tensor->numel() == 0) continue;
    auto [begin, end] = bytes_of(*tensor);
    const char* memory_begin = tensor->is_cuda() ? memory().begin_of(begin) : pinned().begin_of(begin);
    if (memory_begin != nullptr) order().check({begin, end, stream, count, writes, by}, memory_begin);
  }
  TORCH_CHECK(order().race.empty(), order().race);
}

void host_waited_for(const Known& over) {
  std::lock_guard<std::mutex> guard(order().lock);
  join(order().host, over);
}

void host_waited_for_stream(int64_t stream) {
  std::lock_guard<std::mutex> guard(order().lock);
  join(order().host, order().streams[stream]);
}

// ---- streams and events ----

struct Event {
  std::mutex lock;
  std::condition_variable changed;
  int64_t recorded = 0, reached = 0;
  double at_s = 0;
  Known over;  // when it is reached

  void wait(int64_t version) {
    std::unique_lock<std::mutex> guard(lock);
    changed.wait(guard, [&] { return reached >= version; });
  }
  void reach(int64_t version) {
    std::lock_guard<std::mutex> guard(lock);
    reached = std::max(reached, version);
    at_s = now_s();
    changed.notify_all();
  }
};

std::atomic<int> longest_us{200};  // how late copies are at most

// What runs in the order it was given, on a thread of its own.
struct Queue {
  std::mutex lock;
  std::condition_variable changed;
  std::deque<std::function<void()>> tasks;
  int64_t given = 0, done = 0;
  std::mt19937 random;

  explicit Queue(unsigned seed) : random(seed) {
    std::thread([this] { run(); }).detach();
  }
  void give(std::function<void()> task) {
    std::lock_guard<std::mutex> guard(lock);
    tasks.push_back(std::move(task));
    ++given;
    changed.notify_all();
  }
  void drain() {
    std::unique_lock<std::mutex> guard(lock);
    const int64_t until = given;
    changed.wait(guard, [&] { return done >= until; });
  }
  void be_late() {
    if (const int most = longest_us.load(); most > 0)
      std::this_thread::sleep_for(std::chrono::microseconds(random() % most));
  }
  void run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock<std::mutex> guard(lock);
        changed.wait(guard, [&] { return !tasks.empty(); });
        task = std::move(tasks.front());
        tasks.pop_front();
      }
      task();
      std::lock_guard<std::mutex> guard(lock);
      ++done;
      changed.notify_all();
    }
  }
};

struct Queues {
  std::mutex lock;
  std::vector<Queue*> all{new Queue(0)};  // the first is the default stream's: what it sends down
  Queue& at(int64_t id) {
    std::lock_guard<std::mutex> guard(lock);
    return *all.at(id);
  }
  int64_t add() {
    std::lock_guard<std::mutex> guard(lock);
    all.push_back(new Queue(all.size()));
    return static_cast<int64_t>(all.size()) - 1;
  }
  int64_t count() {
    std::lock_guard<std::mutex> guard(lock);
    return static_cast<int64_t>(all.size());
  }
};

Queues& queues() {
  static auto* instance = new Queues;
  return *instance;
}

std::atomic<int> sync_mode{0};  // 0: say nothing, 1: warn, 2: raise
thread_local int inside = 0;    // depth of operators that run on the processor

// The host waits for the device here.
void waits(const char* what) {
  if (inside > 0 || sync_mode == 0) return;
  TORCH_CHECK(sync_mode != 2, "called a synchronizing CUDA operation: ", what);
  TORCH_WARN("called a synchronizing CUDA operation: ", what);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType kType = c10::kCUDA;
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return {kType, 0}; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, 0), id); }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(queues().add()); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(queues().add()); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    const int64_t before = current_stream;
    current_stream = next.id();
    return stream(before);
  }
  void record(void** event, const c10::Stream& on, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new std::shared_ptr<Event>(std::make_shared<Event>());
    auto held = *static_cast<std::shared_ptr<Event>*>(*event);
    const int64_t version = ++held->recorded;
    {
      std::lock_guard<std::mutex> guard(order().lock);
      join(order().streams[on.id()], order().host);
      held->over = order().streams[on.id()];
    }
    queues().at(on.id()).give([held, version] { held->reach(version); });
  }
  void block(void* event, const c10::Stream& on) const override {
    if (event == nullptr) return;
    auto held = *static_cast<std::shared_ptr<Event>*>(event);
    const int64_t version = held->recorded;
    {
      std::lock_guard<std::mutex> guard(order().lock);
      join(order().streams[on.id()], held->over);
    }
    if (on.id() == 0) return held->wait(version);  // what computes is given by this thread, and runs at once
    queues().at(on.id()).give([held, version] { held->wait(version); });
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) return true;
    auto& held = *static_cast<std::shared_ptr<Event>*>(event);
    {
      std::lock_guard<std::mutex> guard(held->lock);
      if (held->reached < held->recorded) return false;
    }
    host_waited_for(held->over);
    return true;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<std::shared_ptr<Event>*>(event);
  }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    auto held = *static_cast<std::shared_ptr<Event>*>(event);
    held->wait(held->recorded);
    host_waited_for(held->over);
  }
  bool queryStream(const c10::Stream& on) const override {
    auto& queue = queues().at(on.id());
    std::lock_guard<std::mutex> guard(queue.lock);
    return queue.done == queue.given;
  }
  void synchronizeStream(const c10::Stream& on) const override {
    waits("synchronizing a stream");
    queues().at(on.id()).drain();
    host_waited_for_stream(on.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    waits("synchronizing the device");
    for (int64_t id = 0; id < queues().count(); ++id) {
      queues().at(id).drain();
      host_waited_for_stream(id);
    }
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    auto& begin = *static_cast<std::shared_ptr<Event>*>(first);
    auto& end = *static_cast<std::shared_ptr<Event>*>(second);
    return (end->at_s - begin->at_s) * 1e3;
  }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* data) const override { return pinned().holds(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override;
  c10::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  c10::Device getDeviceFromPtr(void*) const override { return {c10::kCUDA, 0}; }
};

// torch gives pinned memory away again only when the copies that use it are over. Here its bytes stay as they are, and
// unused: tests are short.
void release_pinned(void* address) {
  order().forget(static_cast<char*>(address));
  pinned().remove(address);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    void* address = nullptr;
    TORCH_CHECK(posix_memalign(&address, 4096, std::max<size_t>(num_bytes, 1)) == 0, "no pinned memory");
    pinned().add(address, std::max<size_t>(num_bytes, 1));
    return {address, address, &release_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_pinned; }
  void copy_data(void* target, const void* source, std::size_t count) const override {
    std::memcpy(target, source, count);
  }
};

PinnedAllocator pinned_allocator;

c10::Allocator* Hooks::getPinnedMemoryAllocator() const { return &pinned_allocator; }

// ---- operators ----

// The same bytes, as a tensor of the host.
at::Tensor on_host(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  if (tensor.numel() == 0) return at::empty(tensor.sizes(), tensor.options().device(at::kCPU));  // may be resized
  auto alias = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                             at::TensorOptions().dtype(tensor.scalar_type()).device(at::kCPU));
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

at::Tensor& copy_(at::Tensor& self, const at::Tensor& source, bool non_blocking) {
  if (self.is_same(source) || self.numel() == 0) return self;
  const bool crosses = self.is_cuda() != source.is_cuda();
  const bool plain = self.is_contiguous() && source.is_contiguous() && self.sizes() == source.sizes() &&
                     self.scalar_type() == source.scalar_type() && self.is_conj() == source.is_conj() &&
                     self.is_neg() == source.is_neg();
  auto& queue = queues().at(current_stream);
  const auto& host = self.is_cuda() ? source : self;
  uses(current_stream, {{&self, true}, {&source, false}}, "a copy");
  const bool late = crosses && plain && non_blocking && pinned().holds(host.data_ptr());
  if (late && (current_stream != 0 || !self.is_cuda())) {
    char* target = static_cast<char*>(self.data_ptr());
    const char* from = static_cast<const char*>(source.data_ptr());
    const size_t num_bytes = self.nbytes();
    if (current_stream == 0) {
      auto taken = std::make_shared<std::vector<char>>(from, from + num_bytes);
      queue.give([=, &queue] {
        queue.be_late();
        std::memcpy(target, taken->data(), num_bytes);
      });
    } else {
      queue.give([=, &queue] {
        queue.be_late();
        std::memcpy(target, from, num_bytes);
      });
    }
    return self;
  }
  const bool blocks = crosses && !(self.is_cuda() && late);
  if (blocks) waits("a copy that blocks");
  if (current_stream != 0) queue.drain();
  if (blocks) host_waited_for_stream(current_stream);
  const Inside guard;
  auto target = on_host(self);
  target.copy_(on_host(source));
  return self;
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_generic(size, &device_allocator, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::CUDA);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, keys, c10::dtype_or_default(dtype));
}

// The bytes of a result of the processor, as a tensor of the device.
at::Tensor on_device(const at::Tensor& tensor) {
  auto placed = empty_strided(tensor.sizes(), tensor.strides(), tensor.scalar_type(), {}, {}, {});
  if (tensor.numel() > 0) on_host(placed).copy_(tensor);
  uses(current_stream, {{&placed, true}}, "a result");
  return placed;
}

at::Scalar local_scalar(const at::Tensor& self) {
  waits("asking for a value");
  uses(current_stream, {{&self, false}}, "asking for a value");
  if (current_stream != 0) queues().at(current_stream).drain();
  host_waited_for_stream(current_stream);
  return on_host(self).item();
}

const at::Tensor& resize_(const at::Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  impl->generic_set_sizes_contiguous(size);
  const size_t needed = (impl->numel() + impl->storage_offset()) * impl->itemsize();
  if (needed > storage->nbytes()) {
    auto fresh = device_allocator.allocate(needed);
    if (storage->data()) std::memcpy(fresh.get(), storage->data(), storage->nbytes());
    storage->set_data_ptr_noswap(std::move(fresh));
    storage->set_nbytes(needed);
  }
  if (format) impl->empty_tensor_restride(*format);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size,
                        c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  if (stride.data() == nullptr || (stride.empty() && !size.empty())) {
    impl->set_storage_offset(offset);
    impl->set_sizes_contiguous(size);
  } else {
    impl->set_sizes_and_strides(size, stride, offset);
  }
  return self;
}

at::Tensor& set_storage_whole(at::Tensor& self, c10::Storage source) {
  const int64_t count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Tensor& set_nothing(at::Tensor& self) {
  return set_storage(self, c10::Storage(c10::Storage::use_byte_size_t(), 0, &device_allocator, true), 0, {0}, {1});
}

// A fused attention of CUDA's has another schema than that of the processor; the plain one has one for all.
int64_t choose_attention(const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                         double, bool, std::optional<double>, bool) {
  return 0;
}

// The device's random numbers: the state of a generator of the processor's, of which it is not the default one.
struct Random {
  std::mutex lock;
  at::Tensor state;
};

Random& device_random() {
  static auto* instance = new Random;
  return *instance;
}

void swap_random() {
  auto generator = at::globalContext().defaultGenerator(c10::Device(c10::kCPU));
  auto before = generator.get_state();
  if (!device_random().state.defined()) device_random().state = before.clone();
  generator.set_state(device_random().state);
  device_random().state = before;
}

// The processor counts fractions only, a device whole numbers too.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  const Inside guard;
  auto host = on_host(self);
  return on_device(at::histc(host.is_floating_point() ? host : host.to(at::kDouble), bins, least, most)
                       .to(self.scalar_type()));
}

// Operators that may mix memories: those that a device has such a kernel for.
bool may_mix(const std::string& name) {
  static const std::set<std::string> names{"aten::index.Tensor", "aten::_index_put_impl_", "aten::index_put_",
                                           "aten::_unsafe_index.Tensor"};
  return names.count(name) != 0;
}

void ask(const std::string& name) {  // operators whose result's size depends on values
  static const std::set<std::string> names{"aten::nonzero", "aten::masked_select", "aten::_unique2",
                                           "aten::unique_consecutive", "aten::unique_dim", "aten::equal",
                                           "aten::is_nonzero", "aten::repeat_interleave.Tensor"};
  if (names.count(name) != 0) waits(name.c_str());
}

// A thread has a handle of cuBLAS, one that a thread that is over has left if there is any.
struct Handle {
  static std::mutex lock;
  static std::set<int> left;
  int number;
  Handle() {
    static int next = 0;
    std::lock_guard<std::mutex> guard(lock);
    number = left.empty() ? next++ : left.extract(left.begin()).value();
  }
  ~Handle() {
    std::lock_guard<std::mutex> guard(lock);
    left.insert(number);
  }
};
std::mutex Handle::lock;
std::set<int> Handle::left;

// Each handle has a workspace for each stream from its first product there on, which torch takes from its own allocator.
// So a backward, which runs on a thread of autograd's, has another than its forward.
void take_workspace(const std::string& name) {
  static const std::set<std::string> products{"aten::mm",  "aten::addmm", "aten::bmm", "aten::baddbmm",
                                              "aten::dot", "aten::mv",    "aten::addmv"};
  static auto* taken = new std::map<std::pair<int, int64_t>, c10::DataPtr>;
  if (products.count(name.substr(0, name.find('.'))) == 0) return;
  thread_local Handle handle;
  std::lock_guard<std::mutex> guard(Handle::lock);
  if (taken->count({handle.number, current_stream}) == 0)
    taken->emplace(std::pair(handle.number, current_stream), device_allocator.allocate(workspace_bytes));
}

// Put `replace` of it in the place of every tensor that a value holds.
template <class Replace>
void replace_tensors(c10::IValue& value, const Replace& replace) {
  if (value.isTensor()) {
    value = replace(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(replace(tensor));
    value = tensors;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> tensors;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
      tensors.push_back(tensor.has_value() ? std::optional<at::Tensor>(replace(*tensor)) : std::nullopt);
    value = tensors;
  }
}

// Every other operator: on the same bytes, by the processor's kernel.
void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto num_arguments = schema.arguments().size();
  const auto name = c10::toString(op.operator_name());
  const size_t begin = stack->size() - num_arguments;
  ask(name);
  take_workspace(name);
  if (current_stream != 0) queues().at(current_stream).drain();
  const Inside guard;

  struct Pair {
    at::Tensor device, host;  // the same bytes
    bool writes;
  };
  std::vector<Pair> pairs;
  bool writes = false;  // to the argument that is being looked at
  auto take = [&](const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) {
      auto alias = on_host(tensor);
      if (tensor.defined()) pairs.push_back({tensor, alias, writes});
      return alias;
    }
    TORCH_CHECK(tensor.dim() == 0 || may_mix(name) || tensor.is_meta(),
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
                name, ")");
    return tensor;
  };
  for (size_t index = begin; index < stack->size(); ++index) {
    auto& value = (*stack)[index];
    const auto* alias = schema.arguments()[index - begin].alias_info();
    writes = alias != nullptr && alias->isWrite();
    if (value.isDevice()) value = c10::Device(c10::kCPU);
    replace_tensors(value, take);
  }
  std::vector<Touch> touches;
  for (auto& pair : pairs) touches.push_back({&pair.device, pair.writes});
  uses(current_stream, touches, name);
  const bool draws = op.hasTag(at::Tag::nondeterministic_seeded);
  std::unique_lock<std::mutex> drawing(device_random().lock, std::defer_lock);
  if (draws) {
    drawing.lock();
    swap_random();
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  if (draws) swap_random();

  auto give_back = [&](const at::Tensor& tensor) -> at::Tensor {
    if (!tensor.defined()) return tensor;
    for (auto& [device, host, written] : pairs) {
      if (!tensor.is_same(host)) continue;
      if (device.sizes() != tensor.sizes()) {
        resize_(device, tensor.sizes(), std::nullopt);
        on_host(device).copy_(tensor);
      }
      return device;
    }
    return on_device(tensor);
  };
  for (size_t index = stack->size() - schema.returns().size(); index < stack->size(); ++index)
    replace_tensors((*stack)[index], give_back);
}

}  // namespace

namespace at {
using EmulatedHooks = ::Hooks;
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", EmulatedHooks)
}  // namespace at

C10_REGISTER_GUARD_IMPL(CUDA, Guard)
REGISTER_ALLOCATOR(c10::kCUDA, &device_allocator)

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("resize_", &resize_);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_storage_whole);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_", &set_nothing);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
  m.impl("histc", &histc);
  m.impl("_fused_sdp_choice", &choose_attention);
}

// ---- what tests ask for ----

extern "C" {
void emulated_sleep(int64_t microseconds) {
  if (current_stream == 0) return;  // what computes would hold up nothing but the test
  queues().at(current_stream).give([microseconds] {
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  });
}
// What was found out of order since the last time, of at most `size` bytes; says so once.
void emulated_race(char* message, size_t size) {
  std::lock_guard<std::mutex> guard(order().lock);
  std::strncpy(message, order().race.c_str(), size - 1);
  order().race.clear();
}
int emulated_sync_mode(int mode) { return sync_mode.exchange(mode); }
void emulated_latest(int microseconds) { longest_us = microseconds; }
// Bytes in all, in use, in use at most, kept, kept at most; how often some were given back for want of others.
void emulated_memory(size_t* figures) {
  std::lock_guard<std::mutex> guard(memory().lock);
  figures[0] = memory().total;
  figures[1] = memory().allocated;
  figures[2] = memory().highest_allocated;
  figures[3] = memory().reserved();
  figures[4] = memory().highest_reserved;
  figures[5] = memory().retries;
}
void emulated_empty_cache() {
  std::lock_guard<std::mutex> guard(memory().lock);
  memory().release();
}
void emulated_allow(size_t total, size_t limit) {
  std::lock_guard<std::mutex> guard(memory().lock);
  memory().total = total;
  memory().limit = limit;
}
void emulated_reset_highest() {
  std::lock_guard<std::mutex> guard(memory().lock);
  memory().highest_allocated = memory().allocated;
  memory().highest_reserved = memory().reserved();
}
int emulated_pin(void* address, size_t num_bytes) {
  if (pinned().overlaps(address, num_bytes)) return 712;  // cudaErrorHostMemoryAlreadyRegistered
  pinned().add(address, num_bytes);
  return 0;
}
int emulated_unpin(void* address) { return pinned().remove(address) ? 0 : 713; }
// Copy the state of the device's random numbers, of `num_bytes`, out or in.
void emulated_random(uint8_t* state, int64_t num_bytes, bool in) {
  std::lock_guard<std::mutex> guard(device_random().lock);
  auto& held = device_random().state;
  if (in || !held.defined()) {
    auto fresh = in ? at::from_blob(state, {num_bytes}, at::kByte).clone()
                    : at::globalContext().defaultGenerator(c10::Device(c10::kCPU)).get_state().clone();
    held = fresh;
  }
  std::memcpy(state, held.data_ptr(), num_bytes);
}
}
