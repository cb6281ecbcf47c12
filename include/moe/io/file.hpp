// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <memory>
#include <new>
#include <random>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#if __has_include(<unistd.h>) && __has_include(<sys/mman.h>)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include <moe/io/dtype.hpp>

// Files: read as memory, and replaced as a whole or not at all. With POSIX calls where they exist.
namespace moe::io {

/// The contents of a file. They stay where they are while a copy of `owner` lives.
struct FileBytes {
  std::span<const std::byte> bytes{};
  std::shared_ptr<const void> owner{};
};

/// Reads a file into memory, which begins with a cache line. O(bytes). Throws CheckpointError.
inline FileBytes read_file(const std::filesystem::path& path) {
  std::error_code error;
  const bool regular = std::filesystem::is_regular_file(path, error);
  if (error) fail_checkpoint(path.string(), ": cannot open: ", error.message());
  require_checkpoint(regular, path.string(), ": cannot open: not a regular file");
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (error) fail_checkpoint(path.string(), ": cannot open: ", error.message());
  require_checkpoint(std::in_range<std::streamsize>(size) && std::in_range<std::size_t>(size), path.string(),
                     ": ", size, " bytes are more than memory can hold");
  constexpr std::align_val_t kAlign{64};
  const std::shared_ptr<std::byte> memory(static_cast<std::byte*>(::operator new(std::size_t(size), kAlign)),
                                          [](std::byte* p) { ::operator delete(p, kAlign); });
  std::ifstream file(path, std::ios::binary);
  require_checkpoint(file.is_open(), path.string(), ": cannot open");
  file.read(reinterpret_cast<char*>(memory.get()), std::streamsize(size));
  require_checkpoint(file.gcount() == std::streamsize(size), path.string(), ": cannot read: got ",
                     file.gcount(), " of ", size, " bytes");
  return {{memory.get(), std::size_t(size)}, memory};
}

#if __has_include(<unistd.h>) && __has_include(<sys/mman.h>)

inline std::string last_error() { return std::system_category().message(errno); }

/// An open file, closed at the end of the scope.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { close(); }

  int get() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  /// False where the system could not write what it had been given.
  bool close() { return fd_ < 0 || ::close(std::exchange(fd_, -1)) == 0; }

 private:
  int fd_;
};

/// Maps a file into memory, read-only. O(1): pages are read when they are touched. Throws
/// CheckpointError. As with any mapping, the process gets SIGBUS if somebody else cuts the file
/// short and it then reads what is gone.
inline FileBytes map_file(const std::filesystem::path& path) {
  const Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file.is_open()) fail_checkpoint(path.string(), ": cannot open: ", last_error());
  struct stat status {};
  if (::fstat(file.get(), &status) != 0) fail_checkpoint(path.string(), ": cannot open: ", last_error());
  require_checkpoint(S_ISREG(status.st_mode), path.string(), ": cannot open: not a regular file");
  require_checkpoint(std::in_range<std::size_t>(status.st_size), path.string(), ": ", status.st_size,
                     " bytes are more than memory can hold");
  const auto size = std::size_t(status.st_size);
  if (size == 0) return {};  // there is no mapping of no bytes
  void* const address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED) fail_checkpoint(path.string(), ": cannot map: ", last_error());
  return {{static_cast<const std::byte*>(address), size},
          std::shared_ptr<const void>(address, [size](void* mapped) { ::munmap(mapped, size); })};
}

/// Removes a file at the end of the scope unless it was kept.
class TemporaryFile {
 public:
  explicit TemporaryFile(std::filesystem::path path) : path_(std::move(path)) {}
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    if (!kept_) ::unlink(path_.c_str());
  }

  const std::filesystem::path& path() const { return path_; }
  void keep() { kept_ = true; }

 private:
  std::filesystem::path path_;
  bool kept_ = false;
};

/// Makes `path` a file that holds `parts`, one after the other. They go to a temporary file beside
/// it, which is synced and then renamed, so a reader finds the old file or the new one, whole,
/// whatever happens. Throws CheckpointError; then the old file is as it was and the temporary one
/// is gone. (There is one exception: the directory is synced last, and where only that fails the
/// new file is there, but a loss of power may bring back the old one. The message says so.)
inline void replace_file(const std::filesystem::path& path,
                         std::span<const std::span<const std::byte>> parts) {
  const std::string where = path.string() + ": cannot write: ";
  const std::filesystem::path parent = path.parent_path();
  const std::filesystem::path directory = parent.empty() ? std::filesystem::path(".") : parent;
  const Descriptor directory_file(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_file.is_open()) fail_checkpoint(where, "directory ", directory.string(), ": ", last_error());

  // A name of its own among processes and threads: whoever creates the file has it.
  std::filesystem::path name;
  int fd = -1;
  constexpr int kMaxAttempts = 10'000;
  for (int i = 0; fd < 0 && i < kMaxAttempts; ++i) {
    name = directory / (".moe-" + std::to_string(::getpid()) + "-" + std::to_string(i) + ".tmp");
    fd = ::open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 && errno != EEXIST) break;
  }
  Descriptor file(fd);
  if (!file.is_open()) fail_checkpoint(where, name.string(), ": ", last_error());
  TemporaryFile temporary(std::move(name));

  for (std::span<const std::byte> rest : parts) {
    while (!rest.empty()) {
      constexpr std::size_t kMost = std::size_t(1) << 30;  // systems refuse 2 GB and more
      const auto written = ::write(file.get(), rest.data(), (std::min)(rest.size(), kMost));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) fail_checkpoint(where, temporary.path().string(), ": ", last_error());
      rest = rest.subspan(std::size_t(written));
    }
  }
  if (::fsync(file.get()) != 0 || !file.close())
    fail_checkpoint(where, temporary.path().string(), ": ", last_error());
  if (::rename(temporary.path().c_str(), path.c_str()) != 0) fail_checkpoint(where, "rename: ", last_error());
  temporary.keep();
  if (::fsync(directory_file.get()) != 0 && errno != EINVAL)  // EINVAL: a file system without it
    fail_checkpoint(path.string(), ": written, but its directory was not synced: ", last_error());
}

#else

/// As there is no mapping here, reads the file.
inline FileBytes map_file(const std::filesystem::path& path) { return read_file(path); }

/// Makes `path` a file that holds `parts`, one after the other, by way of a temporary file beside
/// it. Throws CheckpointError; then the old file is as it was and the temporary one is gone.
/// Nothing is synced: there is no portable way.
inline void replace_file(const std::filesystem::path& path,
                         std::span<const std::span<const std::byte>> parts) {
  const std::filesystem::path temporary =
      path.parent_path() / (".moe-" + std::to_string(std::random_device{}()) + ".tmp");
  std::error_code error;
  {
    std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
    for (const std::span<const std::byte> part : parts)
      file.write(reinterpret_cast<const char*>(part.data()), std::streamsize(part.size()));
    file.close();
    if (!file) error = std::make_error_code(std::errc::io_error);
  }
  if (!error) std::filesystem::rename(temporary, path, error);
  if (!error) return;
  std::error_code ignored;
  std::filesystem::remove(temporary, ignored);
  fail_checkpoint(path.string(), ": cannot write: ", error.message());
}

#endif

}  // namespace moe::io
