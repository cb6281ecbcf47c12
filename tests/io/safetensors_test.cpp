// SPDX-License-Identifier: MIT
#include <bit>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <moe/io.hpp>

#include "files.hpp"

namespace {

using io_test::bytes_of;
using io_test::expect_error;
using io_test::file_by_python;
using io_test::file_of;
using io_test::length_bytes;
using io_test::TemporaryDirectory;
using io_test::write_text;
using moe::Checkpoint;
using moe::DType;
using moe::Index;
using moe::TensorView;
using testing::ElementsAre;

static_assert(std::is_copy_constructible_v<Checkpoint> && std::is_copy_assignable_v<Checkpoint>);

// The header of one tensor 'w' with these members.
std::string one(const std::string& members) { return R"({"w":{)" + members + "}}"; }

constexpr const char* kTwoFloats = R"({"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";

// --- Reading -------------------------------------------------------------------------------------

template <class S>
std::vector<S> numbers(const TensorView& tensor) {
  std::vector<S> out(std::size_t(tensor.size()));
  moe::read_tensor(tensor, out.data());
  return out;
}

TEST(Checkpoint, ReadsWhatPythonWrote) {
  const TemporaryDirectory directory;
  const auto path = directory / "python.safetensors";
  write_text(path, file_by_python());
  const Checkpoint checkpoint = Checkpoint::open(path);
  EXPECT_THAT(checkpoint.names(), ElementsAre("a.weight", "bf", "h", "none", "q", "z"));
  EXPECT_EQ(checkpoint.metadata(), (std::map<std::string, std::string>{{"format", "pt"}}));
  EXPECT_EQ(checkpoint.path(), path);
  const TensorView& weight = checkpoint.at("a.weight");
  EXPECT_EQ(weight.name, "a.weight");
  EXPECT_EQ(weight.dtype, DType::F32);
  EXPECT_THAT(weight.shape, ElementsAre(2, 2));
  EXPECT_EQ(weight.size(), 4);
  EXPECT_TRUE(moe::is_readable_in_place<float>(weight));
  EXPECT_THAT(numbers<float>(weight), ElementsAre(1, -2, .5, 3));
  EXPECT_THAT(numbers<std::int64_t>(checkpoint.at("z")), ElementsAre(7));
  EXPECT_TRUE(checkpoint.at("z").shape.empty());
  EXPECT_THAT(numbers<double>(checkpoint.at("h")), ElementsAre(1.5, -.25, 65504));
  EXPECT_THAT(numbers<float>(checkpoint.at("bf")), ElementsAre(3.140625));
  EXPECT_THAT(checkpoint.at("none").shape, ElementsAre(0, 4));
  EXPECT_EQ(checkpoint.at("none").size(), 0);
  EXPECT_THAT(numbers<std::int64_t>(checkpoint.at("q")), ElementsAre(1, 0, 1));
}

TEST(Checkpoint, StartsEmpty) {
  const Checkpoint none;
  EXPECT_TRUE(none.names().empty());
  EXPECT_FALSE(none.contains("w"));
  expect_error("at", [&] { none.at("w"); }, {"'w'", "among 0"});
}

TEST(Checkpoint, NamesWhatIsMissingAndWhatIsNear) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  write_text(path, file_of(R"({
      "model.layers.0.mlp.gate.weight": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
      "model.layers.1.mlp.gate.weight": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]},
      "lm_head":                        {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]}})",
                           3));
  const Checkpoint checkpoint = Checkpoint::open(path);
  EXPECT_TRUE(checkpoint.contains("lm_head"));
  EXPECT_FALSE(checkpoint.contains("lm_hea"));
  expect_error("near", [&] { checkpoint.at("model.layers.1.mlp.gates.weight"); },
               {path.string(), "'model.layers.1.mlp.gates.weight'", "among 3",
                "did you mean 'model.layers.1.mlp.gate.weight' or 'model.layers.0.mlp"});
  try {
    checkpoint.at("embedding");
    ADD_FAILURE();
  } catch (const moe::CheckpointError& error) {
    EXPECT_EQ(error.what(), path.string() + ": there is no tensor 'embedding' among 3");
  }
  expect_error("long", [&] { checkpoint.at(std::string(100'000, 'x')); }, {"'xxx", "...'"});
  expect_error("strange", [&] { checkpoint.at(std::string("a\0\n\xff", 4)); }, {"'a?\?\?'"});
}

TEST(Checkpoint, ACopySharesTheMemoryAndKeepsIt) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  write_text(path, file_of(kTwoFloats, 8));
  std::optional<Checkpoint> first = Checkpoint::open(path);
  Checkpoint copy = *first;
  const Checkpoint moved = std::move(*first);
  EXPECT_TRUE(first->contains("w"));  // a move is a copy
  const std::byte* const data = moved.at("w").bytes.data();
  EXPECT_EQ(copy.at("w").bytes.data(), data);
  first.reset();
  copy = Checkpoint();
  EXPECT_EQ(moved.at("w").bytes[3], std::byte(3));
  std::filesystem::remove(path);
  EXPECT_EQ(moved.at("w").bytes[7], std::byte(7));
}

TEST(Checkpoint, AnOwnerKeepsTheMemory) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  write_text(path, file_of(kTwoFloats, 8));
  std::shared_ptr<const void> owner;
  const TensorView* view = nullptr;
  std::span<const std::byte> bytes;
  {
    const Checkpoint checkpoint = Checkpoint::open(path);
    owner = checkpoint.owner();
    view = &checkpoint.at("w");
    bytes = view->bytes;
  }
  EXPECT_EQ(view->name, "w");
  EXPECT_EQ(bytes[5], std::byte(5));
}

TEST(Checkpoint, ReadsTensorsInAnyOrderAndAtAnyAddress) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  // The header has 1 byte too few for alignment, names are not in the order of the data, blanks and
  // escapes stand where JSON allows them, and empty tensors lie between others.
  std::string header = R"({"\u0062" : {"shape":[2, 1],"data_offsets":[4,12],"dtype":"F32"},
      "a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
      "e0":{"dtype":"F64","shape":[0],"data_offsets":[0,0]},
      "e1":{"dtype":"F64","shape":[3,0],"data_offsets":[4,4]},
      "e2":{"dtype":"F64","shape":[0],"data_offsets":[12,12]},
      "":{"dtype":"I8","shape":[],"data_offsets":[12,13]},
      "__metadata__":{"k":"","":"v"}})";
  while (header.size() % 8 != 7) header += ' ';
  write_text(path, file_of(header, 13));
  const Checkpoint checkpoint = Checkpoint::open(path);
  EXPECT_THAT(checkpoint.names(), ElementsAre("", "a", "b", "e0", "e1", "e2"));
  EXPECT_FALSE(moe::is_readable_in_place<float>(checkpoint.at("b")));
  EXPECT_EQ(numbers<float>(checkpoint.at("b")),
            (std::vector<float>{std::bit_cast<float>(0x07060504), std::bit_cast<float>(0x0b0a0908)}));
  EXPECT_THAT(numbers<std::int64_t>(checkpoint.at("")), ElementsAre(12));
  EXPECT_EQ(checkpoint.metadata().size(), 2u);
  EXPECT_EQ(checkpoint.metadata().at("k"), "");
}

TEST(Checkpoint, ReadsFilesWithoutTensors) {
  const TemporaryDirectory directory;
  for (const std::string header : {"{}", "{}      ", "{ \n\t}", R"({"__metadata__":{}})"}) {
    const auto path = directory / "m.safetensors";
    write_text(path, file_of(header, 0));
    EXPECT_TRUE(Checkpoint::open(path).names().empty()) << header;
  }
}

// Types that this library does not read, and some that nobody has: who asks for another tensor does not mind.
TEST(Checkpoint, ListsTensorsOfUnknownDTypesAndRefusesThemWhenAskedFor) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  for (const std::string dtype :
       {"C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "f32", "F32 ", "", "new\\n"}) {
    write_text(path, file_of(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
        "b":{"dtype":")" + dtype +
                                 R"(","shape":[3,5],"data_offsets":[8,15]},
        "c":{"dtype":"U8","shape":[1],"data_offsets":[15,16]},
        "none":{"dtype":")" + dtype +
                                 R"(","shape":[0],"data_offsets":[8,8]},
        "__metadata__":{"k":"v"}})",
                             16));
    const Checkpoint checkpoint = Checkpoint::open(path);
    EXPECT_THAT(checkpoint.names(), ElementsAre("a", "b", "c", "none"));
    EXPECT_TRUE(checkpoint.contains("b"));
    EXPECT_EQ(checkpoint.at("a").size(), 2);
    EXPECT_EQ(checkpoint.at("c").bytes[0], std::byte(15));
    EXPECT_EQ(checkpoint.metadata().at("k"), "v");
    const std::string shown = dtype == "new\\n" ? "new?" : dtype;
    for (const std::string name : {"b", "none"})
      expect_error(dtype, [&] { checkpoint.at(name); },
                   {path.string(), "tensor '" + name + "': dtype '" + shown + "' is not read",
                    "expected F64, F32", "BOOL"});
    expect_error("missing", [&] { checkpoint.at("d"); }, {"no tensor 'd' among 4"});
  }
}

TEST(Checkpoint, BelowAPrefixHasTheRestOfTheNames) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  write_text(path, file_of(R"({"a.x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                               "a.y":{"dtype":"F4","shape":[2],"data_offsets":[1,2]},
                               "ab":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},
                               "__metadata__":{"k":"v"}})",
                           3));
  std::optional<Checkpoint> checkpoint = Checkpoint::open(path);
  const Checkpoint below = checkpoint->below("a."), all = checkpoint->below("");
  checkpoint.reset();
  EXPECT_THAT(below.names(), ElementsAre("x", "y"));
  EXPECT_EQ(below.at("x").name, "x");
  EXPECT_EQ(below.at("x").bytes[0], std::byte(0));
  EXPECT_EQ(below.path(), path);
  EXPECT_EQ(below.metadata().at("k"), "v");
  expect_error("unread", [&] { below.at("y"); }, {"'y'", "'F4'"});
  expect_error("not below", [&] { below.at("ab"); }, {"'ab'", "among 2"});
  EXPECT_THAT(all.names(), ElementsAre("a.x", "a.y", "ab"));
  EXPECT_THAT(all.below("a").names(), ElementsAre(".x", ".y", "b"));
  expect_error("none", [&] { all.below("b"); }, {path.string(), "none of 3 names", "'b'"});
}

TEST(Checkpoint, CanBeSharedAmongThreads) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  write_text(path, file_of(kTwoFloats, 8));
  const Checkpoint checkpoint = Checkpoint::open(path);
  std::vector<std::thread> threads;
  std::vector<Index> sizes(4);
  for (std::size_t i = 0; i < sizes.size(); ++i)
    threads.emplace_back([&, i] { sizes[i] = Checkpoint(checkpoint).at("w").size(); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(sizes, ElementsAre(2, 2, 2, 2));
}

// --- Files that lie ------------------------------------------------------------------------------

struct Malformed {
  std::string name;
  std::string file;
  std::vector<std::string> parts;  // of the message
};

std::string nested(const char* bracket, int depth) {
  std::string text;
  for (int i = 0; i < depth; ++i) text += bracket;
  return text;
}

std::vector<Malformed> malformed_files() {
  constexpr int kDeep = 1'000'000;
  const std::string u8 = R"("dtype":"U8","shape":[2],"data_offsets":)";
  const auto shape = [](const std::string& text) {
    return one(R"("dtype":"F32","data_offsets":[0,8],"shape":)" + text);
  };
  const auto two = [](const std::string& first, const std::string& second) {
    return R"({"a":{"dtype":"U8","shape":)" + first + R"(},"b":{"dtype":"U8","shape":)" + second + "}}";
  };
  const std::string cut = file_of(kTwoFloats, 8);
  return {
      // The length.
      {"empty file", "", {"0 bytes", "at least 8"}},
      {"seven bytes", "\1\1\1\1\1\1\1", {"7 bytes", "at least 8"}},
      {"header beyond the file", length_bytes(100) + "{}", {"100 bytes", "ends 2 bytes"}},
      {"header one byte beyond", length_bytes(3) + "{}", {"3 bytes", "ends 2 bytes"}},
      {"largest length", length_bytes(UINT64_MAX) + "{}", {"18446744073709551615", "100000000"}},
      {"length that would wrap", length_bytes(UINT64_MAX - 7), {"18446744073709551608"}},
      {"header over the limit", length_bytes(100'000'001), {"100000001 bytes", "at most 100000000"}},
      {"header at the limit", length_bytes(100'000'000), {"100000000 bytes", "ends 0 bytes"}},
      // JSON.
      {"no header", file_of("", 0), {"the header is not a JSON object", "nothing"}},
      {"blank before the header", file_of(" {}", 0), {"begins with ' '", "'{'"}},
      {"an array", file_of("[]", 0), {"not a JSON object", "'['"}},
      {"a number", file_of("1", 0), {"not a JSON object", "'1'"}},
      {"mark of UTF-8", file_of("\xef\xbb\xbf{}", 0), {"not a JSON object"}},
      {"not JSON", file_of("{w}", 0), {"not JSON", "byte 2"}},
      {"cut JSON", file_of(R"({"w":{"dtype":"F3)", 0), {"not JSON", "byte 18"}},
      {"open object", file_of("{", 0), {"not JSON"}},
      {"two objects", file_of("{}{}", 0), {"not JSON", "byte 3"}},
      {"trailing comma", file_of(R"({"__metadata__":{},})", 0), {"not JSON"}},
      {"a comment", file_of("{}//", 0), {"not JSON"}},
      {"zero byte after", file_of(std::string("{}\0{", 4), 0), {"not JSON", "byte 2 is 0"}},
      {"zero byte within", file_of(std::string("{\0}", 3), 0), {"byte 1 is 0"}},
      {"not UTF-8", file_of("{\"\xff\":1}", 0), {"not JSON in UTF-8", "byte 3"}},
      {"half a character", file_of("{\"\xc3\":1}", 0), {"not JSON in UTF-8"}},
      {"overlong character", file_of("{\"\xc0\xaf\":1}", 0), {"not JSON in UTF-8"}},
      {"lone surrogate", file_of(R"({"\ud800":1})", 0), {"not JSON"}},
      {"line break in a string", file_of("{\"a\nb\":1}", 0), {"not JSON"}},
      {"huge number", file_of(shape("[1e999]"), 8), {"not JSON", "1e999"}},
      // Nesting.
      {"deep arrays", file_of(R"({"w":)" + nested("[", kDeep), 0), {"'w' is an array"}},
      {"deep objects", file_of(nested(R"({"w":)", kDeep), 0), {"unknown member 'w'"}},
      {"deep shape", file_of(shape(nested("[", kDeep)), 8), {"dimension 0 is an array"}},
      {"deep dtype", file_of(one(R"("dtype":)" + nested("[", kDeep)), 8), {"dtype is an array"}},
      {"object in a shape", file_of(shape("[{}]"), 8), {"dimension 0 is an object"}},
      // Keys that come twice.
      {"a tensor twice",
       file_of(R"({"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                   "\u0077":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
               4),
       {"'w' twice"}},
      {"metadata twice", file_of(R"({"__metadata__":{},"__metadata__":{}})", 0), {"'__metadata__' twice"}},
      {"a key of the metadata twice",
       file_of(R"({"__metadata__":{"k":"1","k":"1"}})", 0),
       {"__metadata__", "'k' twice"}},
      {"dtype twice", file_of(one(R"("dtype":"U8",)" + u8 + "[0,2]"), 2), {"'w'", "'dtype' twice"}},
      {"shape twice", file_of(one(R"("shape":[],)" + u8 + "[0,2]"), 2), {"'w'", "'shape' twice"}},
      {"data_offsets twice",
       file_of(one(R"("data_offsets":[],)" + u8 + "[0,2]"), 2),
       {"'w'", "'data_offsets' twice"}},
      // Members.
      {"tensor is a number", file_of(R"({"w":5})", 0), {"'w' is 5", "object"}},
      {"tensor is null", file_of(R"({"w":null})", 0), {"'w' is null"}},
      {"tensor is true", file_of(R"({"w":true})", 0), {"'w' is true"}},
      {"tensor is a string", file_of(R"({"w":"x"})", 0), {"'w' is the string 'x'"}},
      {"no members", file_of(one(""), 0), {"'w' has no dtype"}},
      {"no dtype", file_of(one(R"("shape":[2],"data_offsets":[0,2])"), 2), {"'w' has no dtype"}},
      {"no shape", file_of(one(R"("dtype":"U8","data_offsets":[0,2])"), 2), {"'w' has no shape"}},
      {"no offsets", file_of(one(R"("dtype":"U8","shape":[2])"), 2), {"'w' has no data_offsets"}},
      {"unknown member", file_of(one(u8 + R"([0,2],"stride":1)"), 2), {"'w'", "'stride'"}},
      {"dtype is a number", file_of(one(R"("dtype":32)"), 0), {"dtype is 32", "string"}},
      {"dtype twice, unknown", file_of(one(R"("dtype":"F4","dtype":"F4")"), 0), {"'dtype' twice"}},
      {"unknown dtype, no shape", file_of(one(R"("dtype":"F4","data_offsets":[0,2])"), 2), {"no shape"}},
      {"unknown dtype, end beyond the data",
       file_of(one(R"("dtype":"F4","shape":[4],"data_offsets":[0,3])"), 2),
       {"'w'", "end at 3", "only 2 bytes"}},
      {"unknown dtype, negative dimension",
       file_of(one(R"("dtype":"F4","shape":[-4],"data_offsets":[0,2])"), 2),
       {"dimension 0 is -4"}},
      {"unknown dtype twice",
       file_of(R"({"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]},
                   "w":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
               4),
       {"'w' twice"}},
      {"unknown dtype overlaps",
       file_of(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                   "b":{"dtype":"F4","shape":[4],"data_offsets":[1,3]}})",
               3),
       {"overlap", "'b' begins at 1", "'a' ends at 2"}},
      {"a hole before an unknown dtype",
       file_of(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                   "b":{"dtype":"F4","shape":[4],"data_offsets":[3,5]}})",
               5),
       {"hole", "from 2 to 3", "'b'"}},
      {"trailing bytes after an unknown dtype",
       file_of(one(R"("dtype":"F4","shape":[4],"data_offsets":[0,2])"), 3),
       {"end at 2", "has 3 bytes"}},
      // Shapes.
      {"shape is a number", file_of(shape("2"), 8), {"'w'", "shape is 2", "array"}},
      {"shape is an object", file_of(shape("{}"), 8), {"shape is an object"}},
      {"negative dimension", file_of(shape("[2,-1]"), 8), {"'w'", "dimension 1 is -1"}},
      {"negative zero", file_of(shape("[-0]"), 8), {"dimension 0 is -0"}},
      {"fractional dimension", file_of(shape("[2.5]"), 8), {"dimension 0 is 2.5"}},
      {"whole number as a fraction", file_of(shape("[2.0]"), 8), {"dimension 0 is 2.0"}},
      {"dimension with an exponent", file_of(shape("[2e0]"), 8), {"dimension 0 is 2e0"}},
      {"string in a shape", file_of(shape(R"(["2"])"), 8), {"dimension 0 is the string '2'"}},
      {"dimension of 2^63",
       file_of(shape("[9223372036854775808]"), 8),
       {"9223372036854775808", "9223372036854775807"}},
      {"dimension of 2^64", file_of(shape("[18446744073709551616]"), 8), {"18446744073709551616"}},
      {"product overflows",
       file_of(shape("[4294967296,4294967296]"), 8),
       {"'w'", "[4294967296, 4294967296]", "9223372036854775807"}},
      {"product wraps to 2", file_of(shape("[2,4611686018427387904,4]"), 8), {"9223372036854775807"}},
      {"bytes overflow", file_of(shape("[4611686018427387904]"), 8), {"9223372036854775807"}},
      {"zero hides an overflow", file_of(shape("[4294967296,4294967296,0]"), 8), {"9223372036854775807"}},
      // Offsets.
      {"offsets are a number", file_of(one(u8 + "2"), 2), {"'w'", "data_offsets is 2", "array"}},
      {"no offset", file_of(one(u8 + "[]"), 2), {"0 entries", "expected 2"}},
      {"one offset", file_of(one(u8 + "[0]"), 2), {"1 entries", "expected 2"}},
      {"three offsets", file_of(one(u8 + "[0,2,2]"), 2), {"3 entries", "expected 2"}},
      {"negative offset", file_of(one(u8 + "[-2,0]"), 2), {"data_offsets[0] is -2"}},
      {"fractional offset", file_of(one(u8 + "[0,2.0]"), 2), {"data_offsets[1] is 2.0"}},
      {"offset of 2^64", file_of(one(u8 + "[0,18446744073709551616]"), 2), {"18446744073709551616"}},
      {"null offset", file_of(one(u8 + "[0,null]"), 2), {"data_offsets[1] is null"}},
      {"end before begin", file_of(one(u8 + "[2,0]"), 2), {"'w'", "at 2", "end at 0"}},
      {"end beyond the data", file_of(one(u8 + "[1,3]"), 2), {"'w'", "end at 3", "only 2 bytes"}},
      {"end far beyond",
       file_of(one(u8 + "[0,18446744073709551615]"), 2),
       {"18446744073709551615", "only 2 bytes"}},
      {"cut file", cut.substr(0, cut.size() - 1), {"'w'", "end at 8", "only 7 bytes"}},
      {"too few bytes", file_of(one(u8 + "[0,1]"), 1), {"hold 1 bytes", "expected 2", "U8 [2]"}},
      {"too many bytes", file_of(one(u8 + "[0,3]"), 3), {"hold 3 bytes", "expected 2", "U8 [2]"}},
      {"bytes of an empty tensor", file_of(shape("[2,0]"), 8), {"hold 8 bytes", "expected 0"}},
      {"bytes of a scalar", file_of(shape("[]"), 8), {"hold 8 bytes", "expected 4", "F32 []"}},
      // Together.
      {"the same bytes twice",
       file_of(two(R"([2],"data_offsets":[0,2])", R"([2],"data_offsets":[0,2])"), 2),
       {"overlap", "'b' begins at 0", "'a' ends at 2"}},
      {"overlap by one",
       file_of(two(R"([2],"data_offsets":[0,2])", R"([2],"data_offsets":[1,3])"), 3),
       {"overlap", "'b' begins at 1", "'a' ends at 2"}},
      {"one within the other",
       file_of(two(R"([4],"data_offsets":[0,4])", R"([1],"data_offsets":[2,3])"), 4),
       {"overlap"}},
      {"an empty one within",
       file_of(two(R"([4],"data_offsets":[0,4])", R"([0],"data_offsets":[2,2])"), 4),
       {"overlap"}},
      {"a hole",
       file_of(two(R"([2],"data_offsets":[0,2])", R"([2],"data_offsets":[3,5])"), 5),
       {"hole", "from 2 to 3", "'b'"}},
      {"a hole at the beginning", file_of(one(u8 + "[1,3]"), 3), {"hole", "from 0 to 1", "'w'"}},
      {"trailing bytes", file_of(kTwoFloats, 9), {"end at 8", "has 9 bytes"}},
      {"data without tensors", file_of("{}", 1), {"end at 0", "has 1 bytes"}},
      // Metadata.
      {"metadata is a string",
       file_of(R"({"__metadata__":"x"})", 0),
       {"__metadata__ is the string 'x'", "object"}},
      {"metadata is null", file_of(R"({"__metadata__":null})", 0), {"__metadata__ is null"}},
      {"metadata is an array", file_of(R"({"__metadata__":[]})", 0), {"__metadata__ is an array"}},
      {"metadata holds a number",
       file_of(R"({"__metadata__":{"k":1}})", 0),
       {"__metadata__", "'k' is 1", "string"}},
      {"metadata holds an object", file_of(R"({"__metadata__":{"k":{}}})", 0), {"'k' is an object"}},
      {"metadata holds an array", file_of(R"({"__metadata__":{"k":[]}})", 0), {"'k' is an array"}},
      {"metadata is a tensor",
       file_of(R"({"__metadata__":{"dtype":"U8","shape":[0]}})", 0),
       {"'shape' is an array"}},
  };
}

TEST(MalformedFile, IsRefusedInMemory) {
  for (const Malformed& c : malformed_files()) {
    const auto bytes = bytes_of(c.file);  // of its exact size: a sanitizer sees more
    std::vector<std::string> parts = c.parts;
    parts.push_back("the file: ");
    expect_error(
        c.name, [&] { moe::io::parse_safetensors(bytes, "the file"); }, parts);
  }
}

TEST(MalformedFile, IsRefusedOnDisk) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  for (const Malformed& c : malformed_files()) {
    if (c.file.size() > 10'000) continue;
    write_text(path, c.file);
    std::vector<std::string> parts = c.parts;
    parts.push_back(path.string());
    expect_error(
        c.name, [&] { Checkpoint::open(path); }, parts);
  }
}

// What servers and tools leave in place of a file, and weights in other formats.
TEST(MalformedFile, IsCalledByItsName) {
  const std::string lfs =
      "version https://git-lfs.github.com/spec/v1\n"
      "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n";
  const std::string zeros(100, '\0');
  const std::vector<std::pair<std::string, std::string>> files{
      {lfs, "a Git LFS pointer, not the file: git lfs pull"},
      {"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "an HTML page"},
      {"\xef\xbb\xbf \n<HTML lang=\"en\">", "an HTML page"},
      {std::string("PK\x03\x04\0\0\x08\x08", 8) + zeros, "a zip archive, as PyTorch writes .bin and .pt"},
      {std::string("\x1f\x8b\x08\0\0\0\0\0\0\x03", 10) + zeros, "a gzip file"},  // a length of 559903
      {"\x1f\x8b\x08\x08\x40\x2a\x5b\x67\x02\x03" + zeros, "a gzip file"},
      {"\x28\xb5\x2f\xfd\x24\x05" + zeros, "a zstd file"},
      {"\x89HDF\r\n\x1a\n" + zeros, "an HDF5 file"},
      {std::string("\x80\x02}q\0(X\x04\0", 9) + zeros, "a Python pickle"},
      {"\x80\x05\x95\x20" + zeros, "a Python pickle"},
      {R"({"a":{"b":1}})", R"(text that begins with '{"a":{"b":1}}')"},
      {R"({"data":{"error":"no"}})", "text that begins with '{\"data\":{"},  // '{' where a header would begin
      {"Entry not found", "text that begins with 'Entry not found'"},
      {"not a file\n" + std::string(1000, 'x'), "text that begins with 'not a file?xxx"},
  };
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors", index = directory / "m.safetensors.index.json";
  write_text(index, R"({"weight_map":{"w":"m.safetensors"}})");
  for (const auto& [file, what] : files) {
    write_text(path, file);
    const std::vector<std::string> parts{path.string() + ": the file is " + what,
                                         ", expected a safetensors file"};
    expect_error(
        what, [&] { Checkpoint::open(path); }, parts);
    expect_error(
        what, [&] { Checkpoint::open(index); }, parts);
  }
  for (const auto& [file, what] : files) {
    if (file.starts_with('{')) continue;
    write_text(index, file);
    expect_error(what, [&] { Checkpoint::open(index); },
                 {index.string() + ": the file is " + what, ", expected an index"});
  }
}

// A header may have any of those lengths.
TEST(MalformedFile, IsNotCalledByItsLength) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  for (const std::size_t length : {0x280u, 0x580u, 0x8b1fu}) {
    write_text(path, file_of(kTwoFloats + std::string(length - std::string_view(kTwoFloats).size(), ' '), 8));
    EXPECT_TRUE(Checkpoint::open(path).contains("w")) << length;
  }
}

// A good file, each byte of its header replaced and each shorter length: refused or read, no more.
TEST(MalformedFile, NeverDoesMoreThanThrow) {
  const std::string good = file_by_python();
  int refused = 0, read = 0;
  const auto parse = [&](const std::string& file) {
    const auto bytes = bytes_of(file);
    try {
      for (const auto& [name, tensor] : moe::io::parse_safetensors(bytes, "m").tensors) {
        ASSERT_EQ(tensor.bytes.size(), std::size_t(tensor.size()) * moe::size_of(tensor.dtype));
        ASSERT_GE(tensor.bytes.data(), bytes.data());
        ASSERT_LE(tensor.bytes.data() + tensor.bytes.size(), bytes.data() + bytes.size());
      }
      ++read;
    } catch (const moe::CheckpointError&) {
      ++refused;
    }
  };
  for (std::size_t i = 0; i < good.size(); ++i) {
    parse(good.substr(0, i));
    for (const char c : {'\0', ' ', '"', '0', '9', '-', ']', '}', '\xff'}) {
      std::string changed = good;
      changed[i] = c;
      parse(changed);
    }
  }
  EXPECT_GT(refused, 1000);
  EXPECT_GT(read, 100);
}

// --- Paths and indices ---------------------------------------------------------------------------

TEST(Open, NamesWhatItCannotOpen) {
  const TemporaryDirectory directory;
  const auto missing = directory / "none.safetensors";
  expect_error("missing", [&] { Checkpoint::open(missing); }, {missing.string(), "cannot open"});
  expect_error("missing index", [&] { Checkpoint::open(directory / "x.json"); }, {"cannot open"});
  expect_error("empty path", [] { Checkpoint::open(""); }, {"cannot open"});
  expect_error("a device", [] { Checkpoint::open("/dev/null"); }, {"/dev/null"});
  write_text(directory / "file", "x");
  expect_error("below a file", [&] { Checkpoint::open(directory / "file" / "m"); }, {"cannot open"});
}

TEST(Open, FindsTheOneFileOfADirectory) {
  const TemporaryDirectory directory;
  expect_error("none", [&] { Checkpoint::open(directory.path()); },
               {directory.path().string(), "0 .safetensors.index.json", "0 .safetensors files"});
  write_text(directory / "readme.txt", "");
  write_text(directory / "m.safetensors", file_of(kTwoFloats, 8));
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  EXPECT_TRUE(checkpoint.contains("w"));
  EXPECT_EQ(checkpoint.path(), directory / "m.safetensors");
  write_text(directory / "n.safetensors", file_of(kTwoFloats, 8));
  expect_error("two", [&] { Checkpoint::open(directory.path()); }, {"2 .safetensors files"});
  write_text(directory / "m.safetensors.index.json", R"({"weight_map":{"w":"n.safetensors"}})");
  EXPECT_EQ(Checkpoint::open(directory.path()).path(), directory / "m.safetensors.index.json");
  write_text(directory / "n.safetensors.index.json", R"({"weight_map":{}})");
  expect_error("two indices", [&] { Checkpoint::open(directory.path()); }, {"2 .safetensors.index.json"});
}

// A file of one U8 called as the file is to be.
void write_one(const TemporaryDirectory& directory, const std::string& file, const std::string& tensor) {
  write_text(directory / file,
             file_of(R"({")" + tensor + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)" +
                         R"("__metadata__":{"of":")" + file + R"("}})",
                     1));
}

// What macOS leaves on other file systems, and other hidden files.
TEST(Open, DoesNotCountHiddenFiles) {
  const TemporaryDirectory directory;
  write_one(directory, "m.safetensors", "w");
  for (const char* name : {"._m.safetensors", ".hidden.safetensors", "._m.safetensors.index.json"})
    write_text(directory / name, "Mac OS X");
  EXPECT_EQ(Checkpoint::open(directory.path()).path(), directory / "m.safetensors");
  write_text(directory / "m.safetensors.index.json", R"({"weight_map":{"w":"m.safetensors"}})");
  EXPECT_EQ(Checkpoint::open(directory.path()).path(), directory / "m.safetensors.index.json");
}

TEST(Open, JoinsAllFilesOfASet) {
  const TemporaryDirectory directory;
  // As written by DeepSeek: numbers of 5 digits, their count of 6.
  for (const std::string number : {"1", "2", "3"})
    write_one(directory, "model-0000" + number + "-of-000003.safetensors", "w" + number);
  const Checkpoint checkpoint = Checkpoint::open(directory.path());
  EXPECT_THAT(checkpoint.names(), ElementsAre("w1", "w2", "w3"));
  EXPECT_EQ(checkpoint.path(), directory.path());
  EXPECT_EQ(checkpoint.metadata().at("of"), "model-00001-of-000003.safetensors");
  expect_error("at", [&] { checkpoint.at("x"); }, {directory.path().string(), "among 3"});
  // A file of the set alone can be opened by its own path.
  EXPECT_THAT(Checkpoint::open(directory / "model-00002-of-000003.safetensors").names(), ElementsAre("w2"));

  const std::string where = directory.path().string() + ": ";
  write_one(directory, "model-00004-of-000003.safetensors", "w4");
  expect_error("beyond", [&] { Checkpoint::open(directory.path()); },
               {where + "'model-00004-of-000003.safetensors' is not among the 3 files"});
  std::filesystem::remove(directory / "model-00004-of-000003.safetensors");
  write_one(directory, "other-00001-of-00001.safetensors", "w4");
  expect_error("another set", [&] { Checkpoint::open(directory.path()); },
               {"'other-00001-of-00001.safetensors' is not among the 3 files of the set of "
                "'model-00001-of-000003.safetensors'"});
  std::filesystem::remove(directory / "other-00001-of-00001.safetensors");
  write_one(directory, "consolidated.safetensors", "w4");
  expect_error("no shard", [&] { Checkpoint::open(directory.path()); },
               {"0 .safetensors.index.json and 4 .safetensors files"});
  std::filesystem::remove(directory / "consolidated.safetensors");
  for (const std::string number : {"2", "1"}) {
    std::filesystem::remove(directory / ("model-0000" + number + "-of-000003.safetensors"));
    expect_error("missing", [&] { Checkpoint::open(directory.path()); },
                 {where + "there is no 'model-0000" + number + "-of-000003.safetensors' among " + number,
                  "expected all 3"});
  }
}

TEST(Open, TellsShardsFromOtherFiles) {
  using moe::io::shard_set_of;
  const auto set = shard_set_of("a-b.fp16-00009-of-00010.safetensors");
  ASSERT_TRUE(set.has_value());
  EXPECT_EQ(set->num_files, 10u);
  EXPECT_EQ(set->name(9), "a-b.fp16-00009-of-00010.safetensors");
  EXPECT_EQ(set->name(10), "a-b.fp16-00010-of-00010.safetensors");
  EXPECT_EQ(shard_set_of("m-1-of-12.safetensors")->name(12), "m-12-of-12.safetensors");
  EXPECT_EQ(shard_set_of("1-of-2.safetensors")->name(2), "2-of-2.safetensors");
  for (const std::string name :
       {"model.safetensors", "m-1-of-2.bin", "m-1-of-.safetensors", "m--of-2.safetensors", "-of-.safetensors",
        "-of-2.safetensors", "m-1-of-2a.safetensors", "m-1-of--2.safetensors", "m-1-of",
        "m-1-of-99999999999999999999.safetensors", "one-of-safetensors", ""})
    EXPECT_FALSE(shard_set_of(name).has_value()) << name;
  // As many files as one likes, of which the first that is missing is named.
  const TemporaryDirectory directory;
  write_one(directory, "m-1-of-18446744073709551615.safetensors", "w");
  expect_error("many", [&] { Checkpoint::open(directory.path()); },
               {"no 'm-2-of-18446744073709551615.safetensors' among 1"});
  std::filesystem::remove(directory / "m-1-of-18446744073709551615.safetensors");
  write_one(directory, "m-00001-of-00001.safetensors", "w");
  EXPECT_EQ(Checkpoint::open(directory.path()).path(), directory / "m-00001-of-00001.safetensors");
}

TEST(Open, JoinsAListOfFiles) {
  using Files = std::vector<std::filesystem::path>;
  const TemporaryDirectory directory;
  for (const std::string name : {"b", "a"}) write_one(directory, name, "w" + name);
  const Checkpoint both = Checkpoint::open(Files{directory / "b", directory / "a"});
  EXPECT_THAT(both.names(), ElementsAre("wa", "wb"));
  EXPECT_EQ(both.metadata().at("of"), "b");
  EXPECT_EQ(both.path(), directory / "b");
  EXPECT_EQ(both.at("wa").bytes[0], std::byte(0));
  EXPECT_THAT(Checkpoint::open(Files{directory / "a"}).names(), ElementsAre("wa"));
  const std::string a = (directory / "a").string(),
                    b = (directory / "b").string();  // named in place, by texts too
  EXPECT_THAT(Checkpoint::open({a.c_str(), b.c_str()}).names(), ElementsAre("wa", "wb"));
  EXPECT_THAT(Checkpoint::open({a.c_str()}).names(), ElementsAre("wa"));
  EXPECT_THAT(Checkpoint::open({directory / "a", directory / "b"}).names(), ElementsAre("wa", "wb"));

  write_one(directory, "c", "wb");
  expect_error("twice",
               [&] {
                 Checkpoint::open(Files{directory / "a", directory / "b", directory / "c"});
               },
               {(directory / "c").string() + ": tensor 'wb' is in " + (directory / "b").string() + " too"});
  write_text(directory / "c", file_of(R"({"wb":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}})", 1));
  for (const Files& files : {Files{directory / "c", directory / "b"},
                             {directory / "b", directory / "c"},
                             {directory / "c", directory / "c"}})
    expect_error("twice, once unread", [&] { Checkpoint::open(files); }, {"tensor 'wb' is in"});
  expect_error("missing",
               [&] {
                 Checkpoint::open(Files{directory / "a", directory / "d"});
               },
               {(directory / "d").string(), "cannot open"});
  expect_error("none", [] { Checkpoint::open(Files{}); }, {"0 files", "at least 1"});
}

// A tensor in two files of a set is refused as well.
TEST(Open, RefusesATensorInTwoFilesOfASet) {
  const TemporaryDirectory directory;
  write_one(directory, "m-1-of-2.safetensors", "w");
  write_one(directory, "m-2-of-2.safetensors", "w");
  expect_error("twice", [&] { Checkpoint::open(directory.path()); },
               {(directory / "m-2-of-2.safetensors").string() + ": tensor 'w' is in " +
                (directory / "m-1-of-2.safetensors").string()});
}

// Two shards, one in a directory of its own, and an index.
struct Shards {
  Shards() {
    std::filesystem::create_directory(directory / "sub");
    write_text(directory / "1.safetensors", file_of(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                           "b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},
                           "__metadata__":{"format":"pt","of":"1"}})",
                                                    3));
    write_text(directory / "sub" / "2.safetensors",
               file_of(R"({"c":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                           "a":{"dtype":"U8","shape":[3],"data_offsets":[2,5]},
                           "__metadata__":{"format":"pt","of":"2","more":"x"}})",
                       5));
  }
  Checkpoint open(const std::string& index) const {
    write_text(directory / "m.safetensors.index.json", index);
    return Checkpoint::open(directory / "m.safetensors.index.json");
  }

  TemporaryDirectory directory;
};

TEST(Index, JoinsItsShards) {
  const Shards shards;
  const Checkpoint checkpoint = shards.open(
      R"({"metadata":{"total_size":5,"x":[[{"weight_map":[null,true,-1,0.5,"s"]}]]},
          "weight_map":{"c":"sub/2.safetensors","a":"1.safetensors"},"other":null})");
  EXPECT_THAT(checkpoint.names(), ElementsAre("a", "c"));  // b is in a shard, but not in the index
  EXPECT_FALSE(checkpoint.contains("b"));
  EXPECT_THAT(checkpoint.at("a").shape, ElementsAre(2));  // of the shard that the index names
  EXPECT_THAT(numbers<std::int64_t>(checkpoint.at("c")), ElementsAre(0, 1));
  EXPECT_EQ(checkpoint.metadata(),
            (std::map<std::string, std::string>{{"format", "pt"}, {"more", "x"}, {"of", "1"}}));
  expect_error("at", [&] { checkpoint.at("b"); }, {"m.safetensors.index.json", "'b'", "among 2"});
}

TEST(Index, KeepsAllItsShards) {
  std::optional<Shards> shards(std::in_place);
  const Checkpoint checkpoint =
      shards->open(R"({"weight_map":{"c":"sub/2.safetensors","a":"1.safetensors"}})");
  shards.reset();
  EXPECT_EQ(checkpoint.at("a").bytes[1], std::byte(1));
  EXPECT_EQ(checkpoint.at("c").bytes[1], std::byte(1));
}

TEST(Index, MayBeEmpty) { EXPECT_TRUE(Shards().open(R"({"weight_map":{}})").names().empty()); }

TEST(Index, FollowsLinks) {  // as in the caches of downloads
  const Shards shards;
  std::error_code error;
  std::filesystem::create_symlink(shards.directory / "1.safetensors",
                                  shards.directory / "sub" / "link.safetensors", error);
  if (error) GTEST_SKIP() << "no links here";
  EXPECT_TRUE(shards.open(R"({"weight_map":{"b":"sub/link.safetensors"}})").contains("b"));
}

TEST(Index, RefusesWhatLies) {
  const Shards shards;
  const auto map = [](const std::string& entries) { return R"({"weight_map":{)" + entries + "}}"; };
  const std::string absolute = (shards.directory / "1.safetensors").generic_string();
  const auto depth = [](int n) { return nested("[", n) + nested("]", n); };
  struct Case {
    std::string name, index;
    std::vector<std::string> parts;
  };
  const std::vector<Case> cases{
      {"no file", map(R"("a":"3.safetensors")"), {"'a'", "'3.safetensors'", "does not exist"}},
      {"not there", map(R"("b":"sub/2.safetensors")"), {"'b'", "'sub/2.safetensors'", "not hold"}},
      {"up", map(R"("a":"../1.safetensors")"), {"'a'", "'../1.safetensors'", "below"}},
      {"up again", map(R"("a":"sub/../1.safetensors")"), {"'sub/../1.safetensors'", "below"}},
      {"absolute", map(R"("a":")" + absolute + '"'), {"'a'", "below"}},
      {"no name", map(R"("a":"")"), {"'a'", "''", "below"}},
      {"zero byte", map(R"("a":"1.safetensors\u0000x")"), {"'1.safetensors?x'", "below"}},
      {"a directory", map(R"("a":"sub")"), {"sub", "regular"}},
      {"the directory itself", map(R"("a":".")"), {"regular"}},
      {"the index itself",
       map(R"("a":"m.safetensors.index.json")"),
       {"m.safetensors.index.json: the file is text that begins with '{\"weight_map\"", "safetensors file"}},
      {"a name twice", map(R"("a":"1.safetensors","a":"1.safetensors")"), {"'a' twice"}},
      {"two maps", R"({"weight_map":{},"weight_map":{}})", {"'weight_map' twice"}},
      {"no map", R"({"metadata":{"weight_map":{}}})", {"no weight_map"}},
      {"the map is an array", R"({"weight_map":[]})", {"weight_map is an array", "object"}},
      {"the map is a number", R"({"weight_map":1})", {"weight_map is 1", "object"}},
      {"the map is a string", R"({"weight_map":"a"})", {"weight_map is the string 'a'"}},
      {"a number for a file", map(R"("a":1)"), {"'a' is 1", "string"}},
      {"an array of files", map(R"("a":["1.safetensors"])"), {"'a' is an array", "string"}},
      {"an object for a file", map(R"("a":{})"), {"'a' is an object", "string"}},
      {"empty", "", {"not a JSON object"}},
      {"an array", "[]", {"not a JSON object", "'['"}},
      {"not JSON", R"({"weight_map":{)", {"not JSON"}},
      {"not UTF-8", map("\"\xff\":\"1.safetensors\""), {"not JSON in UTF-8"}},
      {"deep and open", R"({"metadata":)" + nested("[", 1'000'000), {"not JSON"}},
      {"deep objects", nested(R"({"a":)", 1'000'000), {"not JSON"}},
      {"deep, no map", R"({"metadata":)" + depth(1'000'000) + "}", {"no weight_map"}},
  };
  for (const Case& c : cases) {
    std::vector<std::string> parts = c.parts;
    parts.push_back(shards.directory.path().string());
    expect_error(
        c.name, [&] { shards.open(c.index); }, parts);
  }
}

TEST(Index, ListsTensorsOfUnknownDTypes) {
  const Shards shards;
  write_text(shards.directory / "3.safetensors",
             file_of(R"({"d":{"dtype":"F4","shape":[2],"data_offsets":[0,1]},
                         "e":{"dtype":"F4","shape":[2],"data_offsets":[1,2]}})",
                     2));
  const Checkpoint checkpoint = shards.open(R"({"weight_map":{"a":"1.safetensors","d":"3.safetensors"}})");
  EXPECT_THAT(checkpoint.names(), ElementsAre("a", "d"));
  expect_error("d", [&] { checkpoint.at("d"); }, {"'d'", "'F4'"});
  expect_error("e", [&] { checkpoint.at("e"); }, {"no tensor 'e'"});
}

TEST(Index, NamesTheShardThatLies) {
  const Shards shards;
  write_text(shards.directory / "3.safetensors", file_of(kTwoFloats, 7));
  expect_error("shard", [&] { shards.open(R"({"weight_map":{"w":"3.safetensors"}})"); },
               {(shards.directory / "3.safetensors").string(), "end at 8", "7 bytes"});
}

// Where there is no mapping, files are read.
TEST(ReadFile, HoldsTheSameBytes) {
  const TemporaryDirectory directory;
  const auto path = directory / "m.safetensors";
  for (const std::string& text : {std::string(), file_by_python()}) {
    write_text(path, text);
    const auto read = moe::io::read_file(path), mapped = moe::io::map_file(path);
    EXPECT_EQ(moe::io::text_at(read.bytes), text);
    EXPECT_EQ(moe::io::text_at(mapped.bytes), text);
  }
  expect_error("missing", [&] { moe::io::read_file(directory / "none"); }, {"none"});
  expect_error("directory", [&] { moe::io::read_file(directory.path()); }, {"not a regular"});
  expect_error("directory", [&] { moe::io::map_file(directory.path()); }, {"not a regular"});
}

}  // namespace
