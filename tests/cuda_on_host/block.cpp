#include "cuda_on_host/block.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <sstream>
#include <thread>

namespace cuda_on_host {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t guard_size = 0;  // AddressSanitizer puts its own
#else
constexpr size_t guard_size = 256;
#endif
constexpr unsigned char poison = 0xff;  // all ones: a NaN in every floating-point type
constexpr unsigned char guard = 0xa5;

std::string place(const Site& site) {
  const char* name = std::strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string name_of(uint3 index) {
  std::ostringstream name;
  name << "(" << index.x << ", " << index.y << ", " << index.z << ")";
  return name.str();
}

}  // namespace

thread_local Thread* current = nullptr;

Settings& settings() {
  static Settings instance;
  return instance;
}

Poisoned::Poisoned(size_t size, size_t alignment) : size_(size) {
  if (posix_memalign(&data_, std::max<size_t>(alignment, 16), size + guard_size) != 0) throw std::bad_alloc();
  std::memset(data_, poison, size);
  std::memset(static_cast<char*>(data_) + size, guard, guard_size);
}

Poisoned::~Poisoned() { std::free(data_); }

Poisoned::Poisoned(Poisoned&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr; }

bool Poisoned::intact() const {
  const auto* behind = static_cast<const unsigned char*>(data_) + size_;
  return std::all_of(behind, behind + guard_size, [](unsigned char byte) { return byte == guard; });
}

void Thread::finish_copies(size_t pending) {
  if (copy_groups.size() <= pending) return;
  const size_t arriving = copy_groups[copy_groups.size() - pending - 1];
  for (size_t i = 0; i < arriving; ++i) {
    if (copies[i].from) {
      std::memcpy(copies[i].to, copies[i].from, copies[i].bytes);
    } else {
      std::memset(copies[i].to, 0, copies[i].bytes);
    }
  }
  copies.erase(copies.begin(), copies.begin() + arriving);
  copy_groups.erase(copy_groups.begin(), copy_groups.end() - pending);
  for (size_t& end : copy_groups) end -= arriving;
}

Block::Block(dim3 grid, dim3 block, size_t dynamic_shared, const Settings& settings)
    : size(block), grid(grid), settings_(settings), dynamic_size_(dynamic_shared) {
  const int count = block.x * block.y * block.z;
  turns_.resize(count);
  std::iota(turns_.begin(), turns_.end(), 0);
  if (settings.order == Order::reverse) std::reverse(turns_.begin(), turns_.end());
  threads_.resize(count);
  for (int i = 0; i < count; ++i) {
    fibers_.push_back(std::make_unique<Fiber>());
    Thread& thread = threads_[i];
    thread.block = this;
    thread.number = i;
    thread.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    thread.fiber = fibers_[i].get();
  }
}

void Block::run(uint3 block_index, void (*body)(void*), void* argument) {
  index = block_index;
  body_ = body;
  argument_ = argument;
  finished_ = at_barrier_ = holding_ = 0;
  random_.seed(settings_.seed + index.x + (uint64_t{index.y} << 24) + (uint64_t{index.z} << 44));
  shared_.clear();
  dynamic_shared_ = std::make_unique<Poisoned>(dynamic_size_, 16);
  for (Thread& thread : threads_) {
    thread.state = Thread::State::ready;
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.fiber->start(&Block::enter, &thread);
  }
  run_all();
  current = nullptr;
  if (failure_.empty()) check_guards();
  if (!failure_.empty()) throw Fault("block " + name_of(index) + ": " + failure_);
}

void Block::enter(void* pointer) {
  auto* thread = static_cast<Thread*>(pointer);
  Block* block = thread->block;
  block->body_(block->argument_);
  thread->state = Thread::State::finished;
  ++block->finished_;
}

void Block::run_all() {
  const int count = static_cast<int>(threads_.size());
  while (finished_ < count) {
    if (settings_.order == Order::random) std::shuffle(turns_.begin(), turns_.end(), random_);
    bool progress = false;
    for (const int number : turns_) {
      Thread& thread = threads_[number];
      if (thread.state != Thread::State::ready) continue;
      progress = true;
      current = &thread;
      thread.fiber->resume();
      if (!failure_.empty()) return;
    }
    if (at_barrier_ == count) {
      release_barrier();
    } else if (!progress) {
      failure_ = "threads wait for each other in vain:" + places();
      return;
    }
    if (!failure_.empty()) return;
  }
}

int Block::barrier(const char* instruction, bool predicate, Site site) {
  Thread& self = *current;
  self.state = Thread::State::at_barrier;
  self.instruction = instruction;
  self.site = site;
  ++at_barrier_;
  holding_ += predicate;
  self.fiber->suspend();
  return last_count_;
}

void Block::release_barrier() {
  const Thread& first = threads_.front();
  for (Thread& thread : threads_) {
    if (thread.site.line != first.site.line || std::strcmp(thread.site.file, first.site.file) != 0) {
      failure_ = "divergent barriers:" + places();
      return;
    }
  }
  for (Thread& thread : threads_) thread.state = Thread::State::ready;
  last_count_ = holding_;
  at_barrier_ = holding_ = 0;
}

void Block::warp(const char* instruction, unsigned mask, const void* input, void* output, Site site,
                 void (*compute)(const void* const* inputs, void* const* outputs)) {
  Thread& self = *current;
  self.state = Thread::State::in_warp;
  self.instruction = instruction;
  self.site = site;
  self.mask = mask;
  self.input = input;
  self.output = output;
  if (!(mask >> self.lane() & 1)) {
    fail(std::string(instruction) + " at " + place(site) + ": the mask leaves out the lane that calls it");
  }
  const int first = self.number - self.lane();
  const void* inputs[32] = {};
  void* outputs[32] = {};
  bool complete = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const int number = first + lane;
    if (number >= static_cast<int>(threads_.size())) {
      fail(std::string(instruction) + " at " + place(site) + ": the mask names lanes that the block does not have");
    }
    const Thread& other = threads_[number];
    if (other.state == Thread::State::finished) {
      fail(std::string(instruction) + " at " + place(site) + ": the mask names lane " + std::to_string(lane) +
           ", which has returned");
    }
    if (other.state != Thread::State::in_warp) {
      complete = false;
      continue;
    }
    if (other.mask != mask || std::strcmp(other.instruction, instruction) != 0) {
      fail("divergent warp: lane " + std::to_string(self.lane()) + " is in " + instruction + " at " + place(site) +
           ", lane " + std::to_string(lane) + " in " + other.instruction + " at " + place(other.site) +
           (other.mask != mask ? ", with different masks" : ""));
    }
    inputs[lane] = other.input;
    outputs[lane] = other.output;
  }
  if (!complete) {
    self.fiber->suspend();
    return;
  }
  compute(inputs, outputs);
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) threads_[first + lane].state = Thread::State::ready;
  }
}

void* Block::shared_variable(const void* key, size_t bytes, size_t alignment) {
  auto found = shared_.find(key);
  if (found == shared_.end()) found = shared_.emplace(key, Poisoned(bytes, alignment)).first;
  return found->second.data();
}

void* Block::dynamic_shared() { return dynamic_shared_->data(); }

void Block::fail(const std::string& message) {
  failure_ = "thread " + name_of(current->index) + ": " + message;
  current->fiber->suspend(true);
  __builtin_unreachable();
}

void Block::check_guards() {
  bool intact = dynamic_shared_->intact();
  for (const auto& [key, memory] : shared_) intact = intact && memory.intact();
  if (!intact) failure_ = "something was written behind the end of shared memory";
}

std::string Block::places() const {
  // one line for all threads that stand at the same place
  std::map<std::string, std::vector<int>> found;
  for (const Thread& thread : threads_) {
    if (thread.state == Thread::State::finished) {
      found["have returned"].push_back(thread.number);
    } else {
      found[std::string("wait in ") + thread.instruction + " at " + place(thread.site)].push_back(thread.number);
    }
  }
  std::ostringstream text;
  for (const auto& [where, numbers] : found) {
    text << " " << numbers.size() << " (thread " << numbers.front() << (numbers.size() > 1 ? ", …" : "") << ") "
         << where << ";";
  }
  return text.str();
}

void run_grid(dim3 grid, dim3 block, size_t dynamic_shared, void (*body)(void*), void* argument) {
  const Settings now = settings();
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> turns(count);
  std::iota(turns.begin(), turns.end(), 0);
  if (now.order == Order::reverse) std::reverse(turns.begin(), turns.end());
  if (now.order == Order::random) std::shuffle(turns.begin(), turns.end(), std::mt19937_64(now.seed));

  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      Block runner(grid, block, dynamic_shared, now);
      for (uint64_t turn = next++; turn < count; turn = next++) {
        const uint64_t number = turns[turn];
        const auto x = static_cast<unsigned>(number % grid.x), y = static_cast<unsigned>(number / grid.x % grid.y),
                   z = static_cast<unsigned>(number / grid.x / grid.y);
        runner.run({x, y, z}, body, argument);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
      next = count;
    }
  };
  std::vector<std::thread> workers;
  for (uint64_t i = 1; i < std::min<uint64_t>(std::max(now.workers, 1), count); ++i) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace cuda_on_host
