// SPDX-License-Identifier: MIT
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <moe/io.hpp>

#include "io/files.hpp"
#include "io/gguf_files.hpp"

namespace moe::gguf_test {
namespace {

using io_test::expect_error;
using io_test::GGUFFile;
using io_test::raw;
using io_test::raw_text;
using io_test::TemporaryDirectory;
using io_test::write_text;
using testing::ElementsAre;

const std::string kGolden = MOE_GOLDEN_DIR "/";

// Types by their numbers in ggml.
constexpr std::uint32_t kF32 = 0, kQ4_0 = 2, kQ8_0 = 8, kQ2_K = 10, kI64 = 27, kMXFP4 = 39;

// Its views point into `file`.
io::Header parsed(const std::string& file) {
  return io::parse_gguf(std::as_bytes(std::span(file)), "m.gguf");
}

// ---- Files that the gguf package wrote --------------------------------------------------------------

TEST(GGUF, TensorsHaveTypesShapesAndBytes) {
  const auto file = Checkpoint::open(kGolden + "gguf_types.gguf");
  for (const auto& [name, dtype, shape] : {std::tuple{"F32", DType::F32, std::vector<Index>{2, 3, 64}},
                                           {"F16", DType::F16, {2, 3, 64}},
                                           {"BF16", DType::BF16, {2, 3, 64}},
                                           {"Q8_0", DType::Q8_0, {2, 3, 224}},
                                           {"Q4_0", DType::Q4_0, {2, 3, 224}},
                                           {"Q4_1", DType::Q4_1, {2, 3, 224}},
                                           {"Q5_0", DType::Q5_0, {2, 3, 224}},
                                           {"Q5_1", DType::Q5_1, {2, 3, 224}},
                                           {"Q4_K", DType::Q4_K, {2, 3, 512}},
                                           {"Q5_K", DType::Q5_K, {2, 3, 512}},
                                           {"Q6_K", DType::Q6_K, {2, 3, 512}},
                                           {"IQ4_NL", DType::IQ4_NL, {2, 3, 224}},
                                           {"MXFP4", DType::MXFP4, {2, 3, 224}},
                                           {"integers", DType::I64, {3}}}) {
    const TensorView& tensor = file.at(name);
    EXPECT_EQ(tensor.name, name);
    EXPECT_EQ(tensor.dtype, dtype) << name;
    EXPECT_EQ(tensor.shape, shape) << name;
    EXPECT_EQ(tensor.bytes.size(), std::size_t(tensor.size() / numbers_of(dtype)) * size_of(dtype)) << name;
  }
  std::vector<std::int64_t> integers(3);
  read_tensor(file.at("integers"), integers.data());
  EXPECT_THAT(integers, ElementsAre(1, -2, 3));
  EXPECT_THAT(file.names(), testing::Contains("not_read"));
  expect_error("not_read", [&] { file.at("not_read"); }, {"gguf_types.gguf", "'not_read'", "'Q2_K'", "Q4_K"});
}

TEST(GGUF, MetadataIsText) {
  const auto file = Checkpoint::open(kGolden + "gguf_types.gguf");
  const std::map<std::string, std::string> expected{{"general.architecture", "test"},
                                                    {"general.alignment", "64"},
                                                    {"test.uint8", "255"},
                                                    {"test.int8", "-128"},
                                                    {"test.uint16", "65535"},
                                                    {"test.int16", "-32768"},
                                                    {"test.uint32", "4294967295"},
                                                    {"test.int32", "-2147483648"},
                                                    {"test.uint64", "18446744073709551615"},
                                                    {"test.int64", "-9223372036854775808"},
                                                    {"test.float32", "0.1"},
                                                    {"test.float64", "0.1"},
                                                    {"test.true", "true"},
                                                    {"test.false", "false"},
                                                    {"test.string", "one \"line\"\nand \u00e9"},
                                                    {"test.strings", R"(["a","\"b\"",""])"},
                                                    {"test.integers", "[1,-2,3]"},
                                                    {"test.nested", "[[1,2],[3]]"},
                                                    {"test.truths", "[true,false]"}};
  for (const auto& [key, value] : expected) EXPECT_EQ(file.metadata().at(key), value) << key;
}

// Bit for bit: numpy, too, rounds a product and a sum of floats once each, and all products are exact.
TEST(GGUF, BlocksAreTheNumbersThatThePackageGives) {
  const auto file = Checkpoint::open(kGolden + "gguf_types.gguf");
  int types = 0;
  for (const std::string& name : file.names()) {
    if (!name.starts_with("values.")) continue;
    ++types;
    const TensorView& stored = file.at(name.substr(7));
    std::vector<float> expected(std::size_t(file.at(name).size())), floats = expected;
    std::vector<double> doubles(expected.size());
    ASSERT_EQ(Index(expected.size()), stored.size());
    read_tensor(file.at(name), expected.data());
    read_tensor(stored, floats.data());
    read_tensor(stored, doubles.data());
    for (std::size_t i = 0; i < expected.size(); ++i) {
      ASSERT_FALSE(std::isnan(expected[i])) << name << ' ' << i;
      ASSERT_EQ(std::bit_cast<std::uint32_t>(floats[i]), std::bit_cast<std::uint32_t>(expected[i]))
          << name << ' ' << i;
      ASSERT_EQ(std::bit_cast<std::uint64_t>(doubles[i]), std::bit_cast<std::uint64_t>(double(expected[i])))
          << name << ' ' << i;
    }
  }
  EXPECT_EQ(types, 13);
}

TEST(GGUF, AScaleOf255IsNaN) {  // by OCP; the package has 2^127 there
  std::vector<std::uint8_t> block(17, 0x21);
  block[0] = 255;
  GGUFFile file;
  file.tensor("w", {32}, kMXFP4, block);
  std::vector<float> numbers(32);
  read_tensor(file.open().at("w"), numbers.data());
  for (const float number : numbers) EXPECT_TRUE(std::isnan(number));
}

TEST(GGUF, BlocksAreNotWrittenToSafetensorsFiles) {
  const auto file = Checkpoint::open(kGolden + "gguf_types.gguf");
  const std::vector<TensorToWrite> tensors{file.at("Q4_K")};
  const TemporaryDirectory directory;
  expect_error("write", [&] { write_safetensors(directory / "m.safetensors", tensors); },
               {"'Q4_K'", "blocks of 256", "single elements"});
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

TEST(GGUF, RowsAreWholeBlocks) {
  const std::vector<std::byte> bytes(34);
  std::vector<float> out(64);
  for (const std::vector<Index>& shape : {std::vector<Index>{32, 1}, {16, 2}, {33}, {}})
    expect_error(io::text_of(shape),
                 [&] {
                   read_tensor(TensorView{"w", DType::Q8_0, shape, bytes}, out.data());
                 },
                 {"'w'", "Q8_0", "rows of", "multiple of 32"});
  expect_error("bytes",
               [&] {
                 read_tensor(TensorView{"w", DType::Q8_0, {2, 32}, bytes}, out.data());
               },
               {"34 bytes", "expected 68"});
}

TEST(GGUF, FilesOfASetAreOpenedTogether) {
  const TemporaryDirectory directory;
  for (const std::string number : {"1", "2", "3"}) {
    const std::string name = "gguf_split-0000" + number + "-of-00003.gguf";
    std::filesystem::copy_file(kGolden + name, directory / name);
  }
  for (const std::string number : {"1", "3"}) {
    const auto file = Checkpoint::open(directory / ("gguf_split-0000" + number + "-of-00003.gguf"));
    EXPECT_THAT(file.names(), ElementsAre("t0", "t1", "t2", "t3", "t4"));
    EXPECT_EQ(file.metadata().at("general.architecture"), "test");
    for (int i = 0; i < 5; ++i) {
      std::vector<float> numbers(3);
      read_tensor(file.at("t" + std::to_string(i)), numbers.data());
      EXPECT_THAT(numbers, ElementsAre(float(i), float(i + 1), float(i + 2)));
    }
  }
  EXPECT_EQ(Checkpoint::open(directory.path()).names().size(), 5u);
  std::filesystem::rename(directory / "gguf_split-00001-of-00003.gguf", directory / "one.gguf");
  expect_error("a directory of several", [&] { Checkpoint::open(directory.path()); },
               {"3 .gguf files", "expected 1 or one set", "gguf_split-00002-of-00003.gguf"});
  expect_error("one of three", [&] { Checkpoint::open(directory / "one.gguf"); },
               {"one.gguf", "split.count is 3", "1 files"});
  std::filesystem::copy_file(directory / "gguf_split-00002-of-00003.gguf", directory / "two.gguf");
  expect_error("a later file alone", [&] { Checkpoint::open(directory / "two.gguf"); },
               {"two.gguf", "split.count is 3", "1 files"});
  std::filesystem::copy_file(directory / "one.gguf", directory / "gguf_split-00001-of-00003.gguf");
  expect_error("no file of the set", [&] { Checkpoint::open(directory / "gguf_split-00004-of-00003.gguf"); },
               {"gguf_split-00004-of-00003.gguf", "none of the 3 files"});
  expect_error("one file twice",
               [&] {
                 Checkpoint::open({directory / "one.gguf", directory / "two.gguf",
                                   directory / "gguf_split-00002-of-00003.gguf"});
               },
               {"split.no is 1"});
  std::filesystem::remove(directory / "gguf_split-00001-of-00003.gguf");
  expect_error("two of three", [&] { Checkpoint::open(directory / "gguf_split-00002-of-00003.gguf"); },
               {"gguf_split-00001-of-00003.gguf", "all 3"});
}

// ---- Files by hand ----------------------------------------------------------------------------------

GGUFFile small() {
  GGUFFile file;
  file.architecture("test");
  file.tensor("a", {2, 3}, kF32, std::vector<float>{1, 2, 3, 4, 5, 6});
  file.tensor("b", {32}, kQ8_0, std::vector<std::uint8_t>(34, 1));
  return file;
}

TEST(GGUF, ADirectoryMayHoldOneFile) {
  const TemporaryDirectory directory;
  std::filesystem::copy_file(kGolden + "gguf_layer.gguf", directory / "m.gguf");
  EXPECT_TRUE(Checkpoint::open(directory.path()).is_gguf());
  std::filesystem::copy_file(kGolden + "gguf_layer.gguf", directory / "n.gguf");
  expect_error("two", [&] { Checkpoint::open(directory.path()); }, {"2 .gguf files", "m.gguf"});
}

TEST(GGUF, BothVersionsAreRead) {
  for (const std::uint32_t version : {2u, 3u}) {
    GGUFFile file = small();
    file.version = version;
    const auto checkpoint = file.open();
    EXPECT_THAT(checkpoint.names(), ElementsAre("a", "b"));
    EXPECT_THAT(checkpoint.at("a").shape, ElementsAre(2, 3));
    std::vector<float> numbers(6);
    read_tensor(checkpoint.at("a"), numbers.data());
    EXPECT_THAT(numbers, ElementsAre(1, 2, 3, 4, 5, 6));
    EXPECT_TRUE(is_readable_in_place<float>(checkpoint.at("a")));
  }
}

TEST(GGUF, TheEndMayBePaddedOrNot) {
  const std::string file = small().bytes();
  EXPECT_EQ(parsed(file).tensors.size(), 2u);
  EXPECT_EQ(parsed(file.substr(0, file.size() - 30)).tensors.size(), 2u);  // 34 of 64 bytes
  expect_error("less", [&] { parsed(file.substr(0, file.size() - 31)); }, {"m.gguf", "'b'", "34", "65"});
  expect_error("more", [&] { parsed(file + '\0'); }, {"m.gguf", "97", "66"});
}

TEST(GGUF, AFileMayHaveNoTensors) {
  GGUFFile file;
  file.pair("k", 0, raw(std::uint8_t(7)));
  const io::Header header = parsed(file.header());
  EXPECT_TRUE(header.tensors.empty());
  EXPECT_EQ(header.metadata.at("k"), "7");
}

TEST(GGUF, TensorsMayBeEmptyOrInAnyOrder) {
  GGUFFile file;
  file.info("c", {8}, kF32, 32);
  file.info("b", {0, 5}, kF32, 32);
  file.info("scalar", {}, kF32, 0);
  file.data.resize(64);
  file.data[0] = 1;
  const std::string bytes = file.bytes();
  const io::Header header = parsed(bytes);
  EXPECT_THAT(header.tensors.at("b").shape, ElementsAre(5, 0));
  EXPECT_EQ(header.tensors.at("b").size(), 0);
  EXPECT_TRUE(header.tensors.at("scalar").shape.empty());
  EXPECT_EQ(header.tensors.at("scalar").bytes[0], std::byte(1));
  EXPECT_EQ(header.tensors.at("c").bytes.size(), 32u);
}

TEST(GGUF, TypesThatNobodyKnowsAreRefusedWhenAskedFor) {
  GGUFFile file;
  file.info("old", {32}, 4, 0);
  file.info("known", {8}, kF32, 64);
  file.info("new", {3}, 99, 96);
  file.data.resize(101);
  const auto checkpoint = file.open();
  EXPECT_EQ(checkpoint.at("known").bytes.size(), 32u);
  expect_error("old", [&] { checkpoint.at("old"); }, {"'old'", "'type 4'"});
  expect_error("new", [&] { checkpoint.at("new"); }, {"'new'", "'type 99'"});
  const io::Header header = parsed(file.bytes());
  EXPECT_EQ(header.unread.at("old").bytes.size(), 64u);
  EXPECT_EQ(header.unread.at("new").bytes.size(), 5u);
}

TEST(GGUF, NoPartOfAFileIsAFile) {
  const std::string file = small().bytes();
  for (std::size_t size = 0; size < file.size() - 30; ++size)
    expect_error(std::to_string(size), [&] { parsed(file.substr(0, size)); }, {"m.gguf: "});
}

TEST(GGUF, HeadersThatLieAreRefused) {
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  struct Case {
    const char* name;
    GGUFFile file;
    std::vector<std::string> parts;
  };
  std::vector<Case> cases;
  const auto wrong = [&](const char* name, std::vector<std::string> parts) -> GGUFFile& {
    return cases.emplace_back(Case{name, {}, std::move(parts)}).file;
  };
  wrong("version 1", {"version 1", "2 or 3"}).version = 1;
  wrong("version 4", {"version 4", "2 or 3"}).version = 4;
  wrong("big-endian", {"version 50331648", "big-endian"}).version = 3u << 24;
  wrong("pairs", {"metadata_kv_count", std::to_string(kMost), "8 bytes", "at most 0"}).num_pairs = kMost;
  wrong("tensors", {"tensor_count", std::to_string(kMost), "8 bytes", "at most 0"}).num_tensors = kMost;
  for (std::size_t i = cases.size() - 2; i < cases.size(); ++i) cases[i].file.data.resize(8);

  const auto pair = [&](const char* name, std::string_view key, std::uint32_t type, const std::string& value,
                        std::vector<std::string> parts) {
    wrong(name, std::move(parts)).pair(key, type, value);
  };
  pair("no key", "", 0, "77", {"key 0", "at least 1"});
  pair("key not ASCII", "\xc3\xa9", 0, "7", {"key 0", "'?\?'", "ASCII"});
  pair("long key", std::string(65536, 'k'), 0, "7", {"key 0", "65536", "65535"});
  pair("type 13", "k", 13, "12345678", {"'k'", "type 13", "at most 12"});
  pair("truth", "k", 7, "\2", {"'k'", "2", "0 or 1"});
  pair("long string", "k", 8, raw(kMost), {"'k'", std::to_string(kMost), "but the file has only"});
  pair("long array", "k", 9, raw(4u) + raw(kMost), {"'k'", "array's length", std::to_string(kMost)});
  pair("array of strings", "k", 9, raw(8u) + raw(std::uint64_t(3)) + std::string(23, '\0'),
       {"'k'", "array's length of 3", "at most 2"});
  pair("array of what", "k", 9, raw(13u) + raw(std::uint64_t(0)), {"'k'", "type 13", "at most 12"});
  std::string deep;
  for (int i = 0; i < 17; ++i) deep += raw(9u) + raw(std::uint64_t(1));
  pair("deep", "k", 9, deep + std::string(64, '\0'), {"'k'", "17 deep", "at most 16"});
  pair("alignment 0", "general.alignment", 4, raw(0u), {"'general.alignment'", "is 0", "multiple of 8"});
  pair("alignment 12", "general.alignment", 4, raw(12u), {"'general.alignment'", "is 12", "multiple of 8"});
  pair("alignment's type", "general.alignment", 10, raw(std::uint64_t(32)), {"type 10", "expected 4"});
  GGUFFile& keys = wrong("key twice", {"'k'", "twice"});
  keys.pair("k", 0, "7");
  keys.pair("k", 0, "7");

  const auto info = [&](const char* name, std::string_view tensor,
                        const std::vector<std::uint64_t>& dimensions, std::uint32_t type,
                        std::uint64_t offset, std::vector<std::string> parts) {
    GGUFFile& file = wrong(name, std::move(parts));
    file.info(tensor, dimensions, type, offset);
    file.data.resize(64);
  };
  info("long name", std::string(65, 'n'), {16}, kF32, 0, {"tensor 0", "65", "at most 64"});
  info("five dimensions", "w", {1, 1, 1, 1, 16}, kF32, 0, {"'w'", "5 dimensions", "at most 4"});
  info("dimension", "w", {kMost}, kF32, 0, {"'w'", std::to_string(kMost), "9223372036854775807"});
  info("product", "w", {1ull << 62, 16}, kF32, 0,
       {"'w'", "[16, 4611686018427387904]", "9223372036854775807"});
  info("bytes", "w", {1ull << 61, 2}, kF32, 0, {"'w'", "9223372036854775807"});
  info("half a block", "w", {48}, kQ4_0, 0, {"'w'", "48", "multiple of 32"});
  info("too many", "w", {17}, kF32, 0, {"'w'", "68 bytes", "only 64"});
  info("misaligned", "w", {8}, kF32, 8, {"'w'", "offset of 8", "multiple of 32"});
  info("far away", "w", {16}, kF32, kMost - 31, {"'w'", std::to_string(kMost - 31), "expected 0"});
  info("hole", "w", {8}, kF32, 32, {"'w'", "32", "expected 0", "hole"});
  info("rest", "w", {7}, kF32, 0, {"64 bytes", "end at 28"});
  GGUFFile& names = wrong("name twice", {"'w'", "twice"});
  names.info("w", {8}, kF32, 0);
  names.info("w", {8}, kF32, 32);
  GGUFFile& unread = wrong("name twice, unread", {"'w'", "twice"});
  unread.info("w", {8}, kF32, 0);
  unread.info("w", {256}, kQ2_K, 32);
  GGUFFile& overlap = wrong("overlap", {"'v'", "overlaps", "32", "64"});
  overlap.info("w", {8}, kI64, 0);
  overlap.info("v", {8}, kF32, 32);
  overlap.data.resize(64);

  for (const auto& [name, file, parts] : cases) {
    std::vector<std::string> all = parts;
    all.push_back("m.gguf: ");
    const std::string bytes = file.infos.empty() ? file.header() + file.data : file.bytes();
    expect_error(
        name, [&] { parsed(bytes); }, all);
  }
}

TEST(GGUF, OtherFilesAreNamed) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.gguf";
  write_text(path, "<!DOCTYPE html>\n<html>");
  expect_error("page", [&] { Checkpoint::open(path); }, {path.string(), "an HTML page", "a GGUF file"});
  write_text(path, "GGML\1\1\1");
  expect_error("GGML", [&] { Checkpoint::open(path); }, {path.string(), "'GGML'", "'GGUF'"});
  write_text(path, "");
  expect_error("nothing", [&] { Checkpoint::open(path); }, {path.string(), "''", "'GGUF'"});
  write_text(directory / "m", small().bytes());  // by its first bytes
  EXPECT_TRUE(Checkpoint::open(directory / "m").contains("a"));
}

TEST(GGUF, FilesThatWereMergedAreOne) {  // llama.cpp writes a count of 0
  for (const auto& [count, ok] : {std::pair{0, true}, {1, true}, {2, false}}) {
    GGUFFile file = small();
    file.pair("split.count", 2, raw(std::uint16_t(count)));
    if (ok)
      EXPECT_TRUE(file.open().contains("a"));
    else
      expect_error("count", [&] { file.open(); }, {"split.count is 2", "1 files"});
  }
}

}  // namespace
}  // namespace moe::gguf_test
