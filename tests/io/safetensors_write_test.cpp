// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<sys/resource.h>)
#include <sys/resource.h>
#include <csignal>
#endif

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <moe/io.hpp>

#include "files.hpp"

namespace {

using io_test::bytes_of;
using io_test::expect_error;
using io_test::TemporaryDirectory;
using io_test::text_in;
using io_test::write_text;
using moe::Checkpoint;
using moe::DType;
using moe::Index;
using moe::TensorToWrite;
using moe::TensorView;
using testing::ElementsAre;
using Metadata = std::map<std::string, std::string>;

// As the reference implementation orders them: largest elements first.
const std::vector<DType> kAll{DType::U64,     DType::I64, DType::F64,     DType::F32,
                              DType::U32,     DType::I32, DType::BF16,    DType::F16,
                              DType::U16,     DType::I16, DType::F8_E8M0, DType::F8_E4M3,
                              DType::F8_E5M2, DType::I8,  DType::U8,      DType::BOOL};

std::vector<std::string> files_in(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(directory))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

std::string header_in(const std::string& file) {
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  return file.substr(8, std::size_t(length));
}

TEST(WriteSafetensors, RoundTripsEveryDTypeBitwise) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  std::mt19937 random(3);
  std::vector<std::vector<std::byte>> memory;
  std::vector<TensorToWrite> tensors;
  for (const DType dtype : kAll) {
    for (const std::vector<Index>& shape : {std::vector<Index>{}, {0}, {3, 0, 2}, {1}, {3, 5}, {2, 1, 7}}) {
      Index size = 1;
      for (const Index n : shape) size *= n;
      std::vector<std::byte> bytes(std::size_t(size) * moe::size_of(dtype));
      for (std::byte& b : bytes) b = std::byte(random());  // NaN of all kinds among them
      const std::string name = std::string(moe::name_of(dtype)) + std::to_string(memory.size());
      memory.push_back(std::move(bytes));
      tensors.push_back({.name = name, .dtype = dtype, .shape = shape, .bytes = memory.back()});
    }
  }
  std::shuffle(tensors.begin(), tensors.end(), random);
  const Metadata metadata{{"format", "pt"}, {"", "empty key"}, {"quote\"\\\n\x01", "\xc3\xa9"}};
  moe::write_safetensors(path, tensors, metadata);
  const Checkpoint checkpoint = Checkpoint::open(path);
  EXPECT_EQ(checkpoint.names().size(), tensors.size());
  EXPECT_EQ(checkpoint.metadata(), metadata);
  for (const TensorToWrite& tensor : tensors) {
    const TensorView& read = checkpoint.at(tensor.name);
    EXPECT_EQ(read.dtype, tensor.dtype);
    EXPECT_EQ(read.shape, tensor.shape);
    EXPECT_TRUE(std::ranges::equal(read.bytes, tensor.bytes)) << tensor.name;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(read.bytes.data()) % moe::size_of(read.dtype), 0u);
  }
  EXPECT_EQ(header_in(text_in(path)).size() % 8, 0u);
  EXPECT_THAT(files_in(directory.path()), ElementsAre("m.safetensors"));

  // What was read can be written, in another order, and gives the same file.
  std::vector<TensorToWrite> again;
  for (const std::string& name : checkpoint.names()) again.push_back(checkpoint.at(name));
  moe::write_safetensors(directory / "again", again, checkpoint.metadata());
  EXPECT_EQ(text_in(directory / "again"), text_in(path));
}

TEST(WriteSafetensors, WritesWhatPythonWrites) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  const auto weight = bytes_of(std::vector<float>{1, -2, .5f, 3});
  const auto z = bytes_of(std::vector<std::int64_t>{7});
  const auto h = bytes_of(std::vector<std::uint16_t>{0x3e00, 0xb400, 0x7bff});
  const auto bf = bytes_of(std::vector<std::uint16_t>{0x4049});
  const auto q = bytes_of(std::vector<std::uint8_t>{1, 0, 1});
  const std::vector<TensorToWrite> tensors{{"a.weight", DType::F32, {2, 2}, weight},
                                           {"z", DType::I64, {}, z},
                                           {"h", DType::F16, {3}, h},
                                           {"bf", DType::BF16, {1}, bf},
                                           {"none", DType::F32, {0, 4}, {}},
                                           {"q", DType::BOOL, {3}, q}};
  moe::write_safetensors(path, tensors, {{"format", "pt"}});
  EXPECT_EQ(text_in(path), io_test::file_by_python());
}

TEST(WriteSafetensors, OrdersDTypesAndEscapesNamesAsPythonDoes) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  const std::vector<std::byte> zeros(8);
  std::vector<TensorToWrite> tensors;
  for (const DType dtype : kAll) {
    tensors.push_back({.name = std::string(moe::name_of(dtype)),
                       .dtype = dtype,
                       .shape = {1},
                       .bytes = std::span(zeros).first(moe::size_of(dtype))});
  }
  std::reverse(tensors.begin(), tensors.end());
  moe::write_safetensors(path, tensors);
  const std::string header = header_in(text_in(path));
  std::size_t at = 0;
  for (const DType dtype : kAll) {
    const std::size_t next = header.find("{\"dtype\":\"" + std::string(moe::name_of(dtype)) + '"');
    ASSERT_NE(next, std::string::npos);
    EXPECT_GT(next, at);
    at = next;
  }
  moe::write_safetensors(
      path,
      std::vector<TensorToWrite>{{"n\"\\\n\t\x01\x7f\xc3\xa9", DType::F32, {1}, std::span(zeros).first(4)}});
  EXPECT_EQ(header_in(text_in(path)),
            "{\"n\\\"\\\\\\n\\t\\u0001\x7f\xc3\xa9\":"
            "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}} ");
}

TEST(WriteSafetensors, WritesNothingButTheHeaderForNoTensors) {
  const TemporaryDirectory directory;
  moe::write_safetensors(directory / "m", {});
  EXPECT_EQ(text_in(directory / "m"), io_test::length_bytes(8) + "{}      ");
  moe::write_safetensors(directory / "m", {}, {{"b", "2"}, {"a", "1"}});
  EXPECT_EQ(header_in(text_in(directory / "m")), R"({"__metadata__":{"a":"1","b":"2"}}      )");
}

// Who has mapped the old file keeps it, even where a file is written from itself.
TEST(WriteSafetensors, ReplacesAFileThatIsMapped) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  const auto old_bytes = bytes_of(std::vector<float>{1, 2, 3});
  moe::write_safetensors(path, std::vector<TensorToWrite>{{"w", DType::F32, {3}, old_bytes}});
  const Checkpoint before = Checkpoint::open(path);
  TensorToWrite renamed = before.at("w");
  renamed.name = "v";
  moe::write_safetensors(path, std::vector{before.at("w"), renamed});
  EXPECT_TRUE(std::ranges::equal(before.at("w").bytes, old_bytes));
  EXPECT_FALSE(before.contains("v"));
  EXPECT_TRUE(std::ranges::equal(Checkpoint::open(path).at("v").bytes, old_bytes));
}

TEST(WriteSafetensors, WritesWithARelativePath) {
  const TemporaryDirectory directory;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(directory.path());
  moe::write_safetensors("m.safetensors", {});
  std::filesystem::current_path(before);
  EXPECT_THAT(files_in(directory.path()), ElementsAre("m.safetensors"));
}

TEST(WriteSafetensors, RefusesWhatIsNoCheckpointAndLeavesTheOldFile) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  write_text(path, "old");
  const auto bytes = bytes_of(std::vector<float>{1, 2});
  const TensorToWrite good{"w", DType::F32, {2}, bytes};
  const auto with = [&](auto change) {
    TensorToWrite bad = good;
    bad.name = "bad";
    change(bad);
    return std::vector{good, bad};
  };
  struct Case {
    std::string name;
    std::vector<TensorToWrite> tensors;
    Metadata metadata;
    std::vector<std::string> parts;
  };
  constexpr Index kMax = std::numeric_limits<Index>::max();
  const std::vector<Case> cases{
      {"a name twice", with([](auto& t) { t.name = "w"; }), {}, {"'w'", "two"}},
      {"reserved", with([](auto& t) { t.name = "__metadata__"; }), {}, {"'__metadata__'"}},
      {"too few bytes", with([](auto& t) { t.shape = {3}; }), {}, {"'bad'", " 8 ", "12", "[3]"}},
      {"too many bytes", with([](auto& t) { t.shape = {}; }), {}, {"'bad'", " 8 ", "4", "[]"}},
      {"another dtype", with([](auto& t) { t.dtype = DType::F16; }), {}, {" 8 ", "4", "F16 [2]"}},
      {"negative",
       with([](auto& t) {
         t.shape = {-1, -2};
       }),
       {},
       {"'bad'", "[-1, -2]"}},
      {"huge",
       with([](auto& t) {
         t.shape = {kMax, 2};
       }),
       {},
       {"'bad'", "[9223372036854775807"}},
      {"no dtype", with([](auto& t) { t.dtype = DType(77); }), {}, {"77"}},
      {"name", with([](auto& t) { t.name = "\xff"; }), {}, {"name", "'?'", "UTF-8"}},
      {"key", {good}, {{"\xc3", "v"}}, {"key of the metadata", "UTF-8"}},
      {"value", {good}, {{"k", "\xed\xa0\x80"}}, {"value of the metadata", "UTF-8"}},
  };
  for (const Case& c : cases) {
    expect_error(
        c.name, [&] { moe::write_safetensors(path, c.tensors, c.metadata); }, c.parts);
    EXPECT_EQ(text_in(path), "old") << c.name;
    EXPECT_THAT(files_in(directory.path()), ElementsAre("m.safetensors")) << c.name;
  }
  const Metadata large{{"k", std::string(100'000'000, 'x')}};
  expect_error("header", [&] { moe::write_safetensors(path, {}, large); }, {"100000032", "100000000"});
  EXPECT_EQ(text_in(path), "old");
}

TEST(WriteSafetensors, LeavesNothingWhereItCannotWrite) {
  const TemporaryDirectory directory;
  const auto missing = directory / "none" / "m.safetensors";
  expect_error("no directory", [&] { moe::write_safetensors(missing, {}); },
               {missing.string(), "cannot write"});
  std::filesystem::create_directory(directory / "target");
  write_text(directory / "target" / "file", "old");
  expect_error("a directory", [&] { moe::write_safetensors(directory / "target", {}); },
               {(directory / "target").string(), "cannot write"});
  expect_error("below a file", [&] { moe::write_safetensors(directory / "target" / "file" / "m", {}); },
               {"cannot write"});
  expect_error("no name", [] { moe::write_safetensors("", {}); }, {"cannot write"});
  EXPECT_EQ(text_in(directory / "target" / "file"), "old");
  EXPECT_THAT(files_in(directory.path()), ElementsAre("target"));
  EXPECT_THAT(files_in(directory / "target"), ElementsAre("file"));
}

#if __has_include(<sys/resource.h>)
// A disk that is full half-way, played by a limit of the size of files.
TEST(WriteSafetensors, LeavesTheOldFileWhereTheDiskIsFull) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  write_text(path, "old");
  const std::vector<std::byte> bytes(1 << 20);
  const std::vector<TensorToWrite> tensors{{"w", DType::U8, {1 << 20}, bytes}};
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 1 << 16;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  expect_error("full", [&] { moe::write_safetensors(path, tensors); }, {path.string(), "cannot write"});
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(text_in(path), "old");
  EXPECT_THAT(files_in(directory.path()), ElementsAre("m.safetensors"));
  moe::write_safetensors(path, tensors);
  EXPECT_EQ(Checkpoint::open(path).at("w").size(), 1 << 20);
}
#endif

}  // namespace
