// How much memory this process may use: the limits of its control groups, which the machine's size says nothing of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

namespace gfast {

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

// "max" (version 2) is no number and no limit; version 1 writes one that is larger than any memory.
inline uint64_t read_limit(const std::string& file) {
  std::ifstream in(file);
  uint64_t limit;
  return in >> limit ? limit : kNoLimit;
}

// The least limit of the groups from `path` up to the root. In a container the path may be one that it cannot see: then
// the root is the container's own group.
inline uint64_t least_limit(const std::string& root, std::string path, const std::string& name) {
  uint64_t least = read_limit(root + "/" + name);
  for (; path.size() > 1; path.resize(path.rfind('/'))) {
    least = std::min(least, read_limit(root + path + "/" + name));
    if (path.rfind('/') == std::string::npos) break;
  }
  return least;
}

// Is memory one of :cpu,memory: and the like?
inline bool names_memory(const std::string& controllers) {
  const size_t at = controllers.find("memory");
  const auto ends = [](char c) { return c == ':' || c == ','; };
  return at != std::string::npos && ends(controllers[at - 1]) && ends(controllers[at + 6]);
}

// groups: /proc/self/cgroup, lines number:controllers:path. root: /sys/fs/cgroup. Both versions may be there at once.
inline uint64_t cgroup_limit(const std::string& groups, const std::string& root) {
  uint64_t least = kNoLimit;
  std::ifstream in(groups);
  for (std::string line; std::getline(in, line);) {
    const size_t first = line.find(':'), second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first, second - first).append(":"), path = line.substr(second + 1);
    if (controllers == "::")
      least = std::min(least, least_limit(root, path, "memory.max"));
    else if (names_memory(controllers))
      least = std::min(least, least_limit(root + "/memory", path, "memory.limit_in_bytes"));
  }
  return least;
}

}  // namespace gfast
