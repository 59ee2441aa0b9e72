// The memory of the emulated device, divided as torch's allocator of CUDA divides it with expandable segments: a range of
// addresses for small blocks and one for large ones per stream, mapped in pages of 2 or 20 MiB as they are needed, free
// parts cut and joined, pages that are wholly free given back only when the limit is met. What is mapped counts against the
// limit, as in set_per_process_memory_fraction, so what fits here by the plan's books fits there.
#pragma once

#include <sys/mman.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include <c10/util/Exception.h>

constexpr size_t kUnit = 512, kSmall = size_t(1) << 20;
constexpr size_t kSmallPage = size_t(2) << 20, kLargePage = size_t(20) << 20;

inline size_t rounded(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

struct Part {
  size_t size;
  bool mapped, used;
};

// A range of addresses that one stream takes blocks of one kind from. Its parts lie side by side, without gaps.
struct Segment {
  int64_t stream;
  size_t page, length;
  char* base;
  std::map<char*, Part> parts;
  std::set<std::pair<size_t, char*>> idle;  // mapped and free, smallest first
  size_t mapped_bytes = 0;

  Segment(int64_t stream, size_t page, size_t length) : stream(stream), page(page), length(rounded(length, page)) {
    void* range = mmap(nullptr, this->length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(range != MAP_FAILED, "no addresses for the emulated device");
    base = static_cast<char*>(range);
    parts[base] = {this->length, false, false};
  }

  bool has(const char* address) const { return base <= address && address < base + length; }

  // A free part of `size` or more. A part that can grow counts as large as it can become.
  char* fitting(size_t size) {
    auto best = idle.lower_bound({size, nullptr});
    if (best == idle.end()) return nullptr;
    auto at_most = [&](char* address) {
      auto next = std::next(parts.find(address));
      const bool grows = next != parts.end() && !next->second.mapped;
      return parts[address].size + (grows ? next->second.size : 0);
    };
    for (auto next = std::next(best); next != idle.end() && at_most(next->second) < at_most(best->second); ++next)
      best = next;
    return best->second;
  }

  // Map pages so that a free part of `size` comes to be, the smallest gap that allows it first; null: none does.
  char* grown(size_t size) {
    std::set<std::pair<size_t, char*>> gaps;
    for (auto& [address, part] : parts)
      if (!part.mapped) gaps.insert({part.size, address});
    for (auto& [_, gap] : gaps) {
      auto first = parts.find(gap);
      if (first != parts.begin() && !std::prev(first)->second.used) --first;
      char* begin = first->first;
      size_t room = 0;
      for (auto part = first; part != parts.end() && !part->second.used && room < size; ++part) room += part->second.size;
      if (room < size) continue;
      for (char* at = begin; at < begin + size;) {
        const Part part = parts[at];
        const size_t wanted = part.mapped ? part.size : std::min(part.size, rounded(begin + size - at, page));
        if (!part.mapped) map(at, wanted);
        at += wanted;
      }
      return joined(begin);
    }
    return nullptr;
  }

  void map(char* address, size_t size) {
    Part& part = parts[address];
    if (part.size > size) parts[address + size] = {part.size - size, false, false};
    part = {size, true, false};
    mapped_bytes += size;
    idle.insert({size, address});
  }

  // The free part around `address`, one with its free neighbours.
  char* joined(char* address) {
    auto part = parts.find(address);
    auto alike = [&](auto other) { return other->second.mapped && !other->second.used; };
    while (part != parts.begin() && alike(std::prev(part))) --part;
    idle.erase({part->second.size, part->first});
    for (auto next = std::next(part); next != parts.end() && alike(next); next = parts.erase(next)) {
      idle.erase({next->second.size, next->first});
      part->second.size += next->second.size;
    }
    idle.insert({part->second.size, part->first});
    return part->first;
  }

  void use(char* address, size_t size) {
    Part& part = parts[address];
    idle.erase({part.size, address});
    if (part.size > size) {
      parts[address + size] = {part.size - size, true, false};
      idle.insert({part.size - size, address + size});
    }
    part = {size, true, true};
  }

  void free(char* address) {
    Part& part = parts[address];
    part.used = false;
    idle.insert({part.size, address});
    joined(address);
  }

  // Give back the pages that are wholly free.
  void unmap() {
    for (auto [size, address] : std::set(idle)) {
      char* first = base + rounded(address - base, page);
      char* last = base + (address + size - base) / page * page;
      if (first >= last) continue;
      idle.erase({size, address});
      parts.erase(address);
      if (address < first) parts[address] = {size_t(first - address), true, false}, idle.insert({first - address, address});
      parts[first] = {size_t(last - first), false, false};
      if (const size_t rest = address + size - last) parts[last] = {rest, true, false}, idle.insert({rest, last});
      madvise(first, last - first, MADV_DONTNEED);
      mapped_bytes -= last - first;
    }
    for (auto part = parts.begin(); part != parts.end();) {  // gaps side by side are one
      auto next = std::next(part);
      if (next != parts.end() && !part->second.mapped && !next->second.mapped)
        part->second.size += next->second.size, parts.erase(next);
      else
        part = next;
    }
  }
};

struct Memory {
  std::mutex lock;
  std::vector<std::unique_ptr<Segment>> segments;
  size_t total = size_t(8) << 30, limit = size_t(8) << 30;
  size_t allocated = 0, highest_allocated = 0, highest_reserved = 0;
  size_t retries = 0;  // how often pages had to be given back to stay within the limit

  size_t reserved() const {
    size_t sum = 0;
    for (auto& segment : segments) sum += segment->mapped_bytes;
    return sum;
  }

  char* take(size_t num_bytes, int64_t stream) {
    const size_t size = rounded(std::max<size_t>(num_bytes, 1), kUnit);
    std::lock_guard<std::mutex> guard(lock);
    char* address = found(size, stream);
    if (address == nullptr) {
      ++retries;
      release();
      address = found(size, stream);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, address != nullptr, "CUDA out of memory. Tried to allocate ", size, " bytes of ",
                     limit, ", ", allocated, " are in use, ", reserved(), " are kept (emulated device)");
    segment_of(address)->use(address, size);
    allocated += size;
    highest_allocated = std::max(highest_allocated, allocated);
    highest_reserved = std::max(highest_reserved, reserved());
    std::memset(address, 0xfb, std::min<size_t>(size, size_t(1) << 20));
    return address;
  }

  void give(char* address) {
    std::lock_guard<std::mutex> guard(lock);
    const size_t size = used_at(address);
    if (size == 0) return;
    std::memset(address, 0xfb, size);
    allocated -= size;
    segment_of(address)->free(address);
  }

  void release() {
    for (auto& segment : segments) segment->unmap();
  }

  size_t size_of(const char* address) {
    std::lock_guard<std::mutex> guard(lock);
    return used_at(address);
  }

  const char* begin_of(const void* data) {  // of the block that holds `data`; null: none does
    std::lock_guard<std::mutex> guard(lock);
    auto address = const_cast<char*>(static_cast<const char*>(data));
    Segment* segment = segment_of(address);
    if (segment == nullptr) return nullptr;
    auto part = std::prev(segment->parts.upper_bound(address));
    return part->second.used ? part->first : nullptr;
  }

 private:
  Segment* segment_of(const char* address) {
    for (auto& segment : segments)
      if (segment->has(address)) return segment.get();
    return nullptr;
  }

  size_t used_at(const char* address) {
    Segment* segment = segment_of(address);
    if (segment == nullptr) return 0;
    auto part = segment->parts.find(const_cast<char*>(address));
    return part != segment->parts.end() && part->second.used ? part->second.size : 0;
  }

  char* found(size_t size, int64_t stream) {
    const size_t page = size <= kSmall ? kSmallPage : kLargePage;
    for (auto& segment : segments)
      if (segment->stream == stream && segment->page == page)
        if (char* address = segment->fitting(size)) return address;
    // What may be missing of it does not count: torch asks for all of it before it looks what is there.
    const size_t asked = size < kLargePage / 2 ? page : rounded(size, kSmallPage);
    if (reserved() + asked > limit) return nullptr;
    for (auto& segment : segments)
      if (segment->stream == stream && segment->page == page)
        if (char* address = segment->grown(size)) return address;
    segments.push_back(std::make_unique<Segment>(stream, page, total + total / 8));
    return segments.back()->grown(size);
  }
};
