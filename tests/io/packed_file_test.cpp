// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if __has_include(<sys/wait.h>)
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <gtest/gtest.h>

#include <moe/io.hpp>
#include <moe/moe.hpp>
#include <moe/packed.hpp>

#include "files.hpp"

namespace packed_file_test {
namespace {

using io_test::TemporaryDirectory;
using moe::CheckpointError;
using moe::Index;
using moe::Matrix;
using moe::Rng;
using Gated = moe::GatedFeedForward<float>;
using TopK = moe::TopKRouter<float>;
using Layer = moe::PackedMoELayer<Gated, TopK>;

bool same_bits(const Matrix<float>& a, const Matrix<float>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(float)) == 0;
}

Matrix<float> tokens(Index d_model) {
  Rng rng(7);
  Matrix<float> x(9, d_model);
  moe::fill_normal(x, 1.0, rng);
  return x;
}

template <class Thing>
Thing filled(Thing thing, std::uint64_t seed) {
  Rng rng(seed);
  Thing::visit([&](const moe::ParameterInfo&, auto& array) { moe::fill_normal(array, 0.3, rng); }, thing);
  return thing;
}

// Four routed experts and a gated shared one, with biases, of awkward sizes.
moe::MoELayer<Gated, TopK> awkward_layer(std::uint64_t seed) {
  const Gated expert({.d_model = 40, .d_ff = 33, .bias = true});
  moe::MoELayer<Gated, TopK> layer{
      std::vector<Gated>(4, expert),
      TopK({.d_model = 40, .num_experts = 4, .top_k = 2, .bias = true, .selection_bias = true}),
      {.experts = {expert}, .gated = true},
      true};
  return filled(std::move(layer), seed);
}

template <moe::Format... F, class Packed>
void expect_round_trip(const Packed& packed) {
  const TemporaryDirectory directory;
  moe::save_packed(directory / "layer", packed);
  const auto mapped = moe::map_packed<Packed, F...>(directory / "layer");
  EXPECT_EQ(mapped.memory_bytes(), packed.memory_bytes());
  EXPECT_EQ(mapped.instruction_set(), packed.instruction_set());
  const Matrix<float> x = tokens(packed.d_model());
  moe::BatchInfo info;
  info.token_ids = moe::IndexVector::LinSpaced(x.rows(), 0, x.rows() - 1);
  EXPECT_TRUE(same_bits(mapped.forward(x, info), packed.forward(x, info)));
  const Packed copy = mapped;  // shares the pages
  std::filesystem::remove(directory / "layer");
  EXPECT_TRUE(same_bits(copy.forward(x, info), packed.forward(x, info)));
  // Saved again, the file is the same.
  moe::save_packed(directory / "again", mapped);
  moe::save_packed(directory / "layer", packed);
  EXPECT_EQ(io_test::text_in(directory / "again"), io_test::text_in(directory / "layer"));
  moe::verify_packed(directory / "again");
}

TEST(PackedFile, ARoundTripKeepsEveryBit) {
  const auto layer = awkward_layer(1);
  expect_round_trip<moe::F32>(moe::pack<moe::F32>(layer));
  expect_round_trip<moe::FP8, moe::F32>(moe::pack<moe::FP8>(layer));
  expect_round_trip<moe::Int4, moe::MXFP4, moe::BF16>(moe::pack<moe::BF16, moe::Int4, moe::MXFP4>(
      layer, [](Index e) { return e % 3; }, {.int8_activations = true}));
  expect_round_trip<moe::F32, moe::Int8, moe::Int4Offset>(moe::pack<moe::Int8, moe::Int4Offset>(
      layer, [](Index e) { return e / 4; }, {.instruction_set = moe::InstructionSet::portable}));
}

TEST(PackedFile, HoldsExpertsOfSeveralKinds) {
  using Clamped = moe::GatedFeedForward<float, moe::ClampedSwiGLU>;
  using Ungated = moe::FeedForward<float, moe::GELU>;
  using Either = moe::VariantExpert<Clamped, Ungated>;
  Rng rng(2);
  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<Either> experts{
      Clamped({.d_model = 24, .d_ff = 40, .bias = false, .glu = {.alpha = 1.702f, .limit = infinity}}, rng),
      Ungated({.d_model = 24, .d_ff = 7, .bias = true}, rng)};
  const TopK router({.d_model = 24, .num_experts = 2, .top_k = 1}, rng);
  expect_round_trip<moe::F32>(moe::pack<moe::F32>(moe::MoELayer<Either, TopK>{experts, router}));
}

TEST(PackedFile, HoldsSomeOfTheExperts) {
  const std::vector<Index> kept{3, 1};
  expect_round_trip<moe::Int8>(moe::pack<moe::Int8>(awkward_layer(1), {.keep_experts = kept}));
  expect_round_trip<moe::Int8>(
      moe::pack<moe::Int8>(awkward_layer(1), {.keep_experts = kept, .renormalise_over_kept = false}));
}

template <class Router>
auto packed_with(Router router) {
  Rng rng(3);
  return moe::pack<moe::F32>(moe::MoELayer<Gated, Router>{
      moe::make_experts<Gated>(4, {.d_model = 16, .d_ff = 8}, rng), filled(std::move(router), 4)});
}

TEST(PackedFile, HoldsTheRouterWithItsOptions) {
  expect_round_trip<moe::F32>(
      packed_with(TopK({.d_model = 16,
                        .num_experts = 4,
                        .top_k = 1,
                        .score = moe::Score::sigmoid,
                        .renormalise = true,
                        .renormalise_epsilon = 1e-20,
                        .gate_scale = 2.5,
                        .gate_side = moe::GateSide::input,
                        .group_limit = {.groups = 2, .kept = 1, .score = moe::GroupScore::top_two_sum},
                        .capacity = 1.1,
                        .overflow = moe::Overflow::pass_through})));
  expect_round_trip<moe::F32>(
      packed_with(moe::NoisyTopKRouter<float>({.d_model = 16, .num_experts = 4, .top_k = 3})));
  expect_round_trip<moe::F32>(packed_with(moe::SinkhornRouter<float>({.d_model = 16, .num_experts = 4})));
  expect_round_trip<moe::F32>(packed_with(moe::SparseMixerRouter<float>({.d_model = 16, .num_experts = 4})));
  expect_round_trip<moe::F32>(
      packed_with(moe::ExpertChoiceRouter<float>({.d_model = 16, .num_experts = 4, .capacity = 1.5})));
}

TEST(PackedFile, HoldsAHashTable) {
  Rng rng(3);
  moe::HashOptions options{.d_model = 16, .num_experts = 4};
  options.table.setLinSpaced(9, 0, 8);
  for (Index& expert : options.table) expert = (expert * 7 + 1) % 4;
  using Hash = moe::HashRouter<float>;
  expect_round_trip<moe::F32>(moe::pack<moe::F32>(moe::MoELayer<Gated, Hash>{
      moe::make_experts<Gated>(4, {.d_model = 16, .d_ff = 8}, rng), Hash(options)}));
}

// What a call throws; it must be a CheckpointError.
std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const CheckpointError& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("another exception: ") + error.what();
  }
  return "nothing was thrown";
}

void expect_refused(const std::function<void()>& call, const std::vector<std::string>& parts) {
  const std::string message = refusal(call);
  for (const std::string& part : parts)
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nhas no " << part;
}

TEST(PackedFile, ARouterWithoutOptionsInTheFileIsGiven) {
  Rng rng(5);
  const auto child = [&] { return filled(TopK({.d_model = 16, .num_experts = 2, .top_k = 1}), rng()); };
  const auto tree = [&] { return moe::HierarchicalRouter(child(), std::vector{child(), child()}); };
  using Tree = decltype(tree());
  const auto packed = packed_with(tree());
  const TemporaryDirectory directory;
  moe::save_packed(directory / "layer", packed);
  const auto mapped = moe::map_packed<decltype(packed), moe::F32>(directory / "layer", tree());
  const Matrix<float> x = tokens(16);
  EXPECT_TRUE(same_bits(mapped.forward(x), packed.forward(x)));
  const Tree other(TopK({.d_model = 16, .num_experts = 2, .top_k = 2}), std::vector{child(), child()});
  expect_refused(
      [&] { moe::map_packed<decltype(packed), moe::F32>(directory / "layer", other); },
      {"was saved with router = ", "2 top_k=1) ch", "expected parent(d_model=16 num_experts=2) ch"});
}

// A file that is changed and then mapped.
class DamagedFile : public testing::Test {
 protected:
  DamagedFile() {
    moe::save_packed(path_, moe::pack<moe::Int8>(awkward_layer(1)));
    bytes_ = io_test::text_in(path_);
  }

  void map() const { moe::map_packed<Layer, moe::Int8>(path_); }
  std::string refusal_of(const std::string& bytes) const {
    io_test::write_text(path_, bytes);
    return refusal([&] { map(); });
  }
  // The file with other metadata, which its checksum knows.
  void expect_metadata_refused(const std::string& key, const std::string& value,
                               const std::vector<std::string>& parts) const {
    const moe::io::FileBytes file = moe::io::read_file(path_);
    const moe::io::Header header = moe::io::parse_safetensors(file.bytes, "");
    std::vector<moe::TensorToWrite> tensors;
    for (const auto& [name, tensor] : header.tensors) tensors.push_back(tensor);
    auto metadata = header.metadata;
    metadata[key] = value;
    metadata["checksum"] = moe::io::header_checksum(metadata, tensors);
    const auto layout = moe::io::layout_of(tensors, metadata, "", 4096);
    moe::io::replace_file(directory_ / "other", moe::io::parts_of(layout));
    expect_refused([&] { moe::map_packed<Layer, moe::Int8>(directory_ / "other"); }, parts);
  }

  const TemporaryDirectory directory_;
  const std::filesystem::path path_ = directory_ / "layer";
  std::string bytes_;
};

TEST_F(DamagedFile, IsRefusedWhereverItIsCut) {
  const std::size_t size = bytes_.size();
  std::uint64_t length = 0;
  std::memcpy(&length, bytes_.data(), 8);
  for (const std::size_t cut : {std::size_t(0), std::size_t(1), std::size_t(8), std::size_t(9),
                                std::size_t(length), std::size_t(length + 7), std::size_t(length + 8),
                                std::size_t(length + 9), size / 2, size - 4096, size - 4, size - 1}) {
    const std::string message = refusal_of(bytes_.substr(0, cut));
    EXPECT_NE(message.find(path_.string()), std::string::npos) << cut << ": " << message;
    EXPECT_EQ(message.find("another exception"), std::string::npos) << cut << ": " << message;
  }
  EXPECT_NE(refusal_of(bytes_.substr(0, size - 1)).find("but the file has only"), std::string::npos);
}

TEST_F(DamagedFile, IsRefusedWithMoreBehindIt) {
  const std::string message = refusal_of(bytes_ + std::string(4096, '\0'));
  EXPECT_NE(message.find("the tensors end at"), std::string::npos) << message;
}

TEST_F(DamagedFile, IsRefusedForEveryFlippedBitOfTheHeader) {
  std::uint64_t length = 0;
  std::memcpy(&length, bytes_.data(), 8);
  const std::size_t end = std::min(bytes_.find_last_not_of(' ', 7 + length), std::size_t(length)) + 8;
  std::minstd_rand random(1);
  for (int i = 0; i < 300; ++i) {
    std::string damaged = bytes_;
    const std::size_t at = i < 64 ? std::size_t(i) / 8 : random() % end;
    damaged[at] = char(damaged[at] ^ (1 << (i % 8)));
    const std::string message = refusal_of(damaged);
    EXPECT_NE(message.find(path_.string()), std::string::npos) << at << ": " << message;
  }
}

TEST_F(DamagedFile, NamesWhatDoesNotFit) {
  expect_metadata_refused("format_version", "2", {"format_version = '2'", "expected '1'"});
  expect_metadata_refused("format", "pt", {"format = 'pt'", "expected 'moe_packed'"});
  expect_metadata_refused("scalar", "double", {"scalar = 'double'", "expected 'float'"});
  expect_metadata_refused("instruction_set", "avx9", {"instruction_set = 'avx9'"});
  expect_metadata_refused("panels", "columns=7 streams=1 lanes=7", {"columns=7", "expected 'columns="});
  expect_metadata_refused("num_shared_experts", "2", {"2", "1"});
  expect_metadata_refused("num_shared_experts", "-1", {"num_shared_experts"});
  expect_metadata_refused("router", "d_model=40 num_experts=4 top_k=3 new_option=1", {"new_option=1"});
  expect_metadata_refused("router", "d_model=40 num_experts=4 top_k=9", {"top_k", "9", "4"});
  expect_metadata_refused("router", "d_model=40 num_experts=5", {"router.", "[5"});
  expect_metadata_refused("experts.2", "format=Int8 d_model=40 d_ff=64 unit=silu gated=true bias=true",
                          {"bytes, expected"});
  expect_metadata_refused("experts.2", "format=Int8 d_model=40 d_ff=-1", {"d_ff = -1"});
  expect_metadata_refused("experts.2", "format=Int8 d_model=39 d_ff=33 unit=silu gated=true bias=true",
                          {"d_model = 39, expected 40"});
  expect_metadata_refused("experts.2", "format=Int5 d_model=40 d_ff=33",
                          {"expert 2 is in Int5, expected Int8"});
  expect_metadata_refused("experts.9", "format=Int8", {});
  const moe::InstructionSet sets[] = {moe::InstructionSet::avx2, moe::InstructionSet::avx512,
                                      moe::InstructionSet::amx};
  for (const moe::InstructionSet set : sets)
    if (!moe::is_available(set))
      expect_metadata_refused("instruction_set", moe::io::enumerator(set),
                              {moe::name_of(set), "which this processor does not have"});
}

TEST_F(DamagedFile, ForeignFilesAreNamed) {
  EXPECT_NE(refusal_of("GGUF\3\0\0\0 and more of it").find("GGUF file"), std::string::npos);
  EXPECT_NE(refusal_of("<!DOCTYPE html><html>not found").find("HTML"), std::string::npos);
  moe::save_layer(path_, awkward_layer(1));
  expect_refused([&] { map(); }, {"format = 'moe'", "expected 'moe_packed'"});
  expect_refused([&] { moe::map_packed<Layer, moe::Int8>(directory_ / "none"); }, {"none", "cannot open"});
}

TEST_F(DamagedFile, BytesOfExpertsAreLookedAtWhenAsked) {
  const std::size_t at = bytes_.size() / 2;
  std::string damaged = bytes_;
  damaged[at] = char(damaged[at] ^ 1);
  EXPECT_EQ(refusal_of(damaged), "nothing was thrown");
  expect_refused([&] { moe::verify_packed(path_); }, {"the bytes of 'experts.", "damaged", "expected"});
  // Those of the router always are.
  damaged = bytes_;
  damaged.back() = char(damaged.back() ^ 1);
  EXPECT_NE(refusal_of(damaged).find("the bytes of 'w_shared_gate' are damaged"), std::string::npos);
}

TEST(PackedFile, FormatsThatAreNotListedAreRefused) {
  const TemporaryDirectory directory;
  moe::save_packed(directory / "layer", moe::pack<moe::Int4>(awkward_layer(1)));
  expect_refused([&] { moe::map_packed<Layer, moe::Int8, moe::F32>(directory / "layer"); },
                 {"expert 0 is in Int4, expected Int8 or F32"});
}

#if __has_include(<sys/wait.h>)

// A child that saves one layer after the other and is killed: there is always one of them, whole.
TEST(PackedFile, AWriterThatIsKilledLeavesTheOldFileOrTheNewOne) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory / "layer";
  const Layer layers[] = {moe::pack<moe::F32>(awkward_layer(1)), moe::pack<moe::F32>(awkward_layer(2))};
  moe::save_packed(path, layers[0]);
  const std::string one = io_test::text_in(path);
  moe::save_packed(path, layers[1]);
  const std::string two = io_test::text_in(path);
  std::minstd_rand random(1);
  for (int i = 0; i < 20; ++i) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0)
      for (int k = 0;; ++k) moe::save_packed(path, layers[k % 2]);
    ::usleep(useconds_t(random() % 20'000));
    ASSERT_EQ(::kill(child, SIGKILL), 0);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status));
    const std::string now = io_test::text_in(path);
    EXPECT_TRUE(now == one || now == two);
    moe::map_packed<Layer, moe::F32>(path);
    moe::verify_packed(path);
  }
}

// 50 MB: what the system reads ahead, 8 MB where this was written, is little of it.
Layer large_layer() {
  Rng rng(1);
  const Gated one({.d_model = 256, .d_ff = 256}, rng);
  const TopK router({.d_model = 256, .num_experts = 64, .top_k = 2}, rng);
  return moe::pack<moe::F32>(moe::PackedParts<TopK>{router}, [&](Index) -> const Gated& { return one; });
}

// Takes a file out of the page cache, if the file system can.
void evict(const std::filesystem::path& path) {
  const moe::io::Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(::fsync(file.get()), 0);
  ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
}

double sum_of(const std::vector<double>& shares) {
  double sum = 0;
  for (const double share : shares) sum += share;
  return sum;
}

TEST(PackedPages, MappingReadsNoExpertsAndPrefetchThoseThatAreNamed) {
  const TemporaryDirectory directory;
  moe::save_packed(directory / "layer", large_layer());
  evict(directory / "layer");
  const moe::io::FileBytes file = moe::io::map_file(directory / "layer");
  if (moe::io::resident_share(moe::io::pages_of(file.bytes)) > 0.1)
    GTEST_SKIP() << "the file system keeps its files in memory";
  const auto mapped = moe::map_packed<Layer, moe::F32>(directory / "layer");
  const std::vector<double> before = moe::residency(mapped);
  ASSERT_EQ(before.size(), 64u);
  EXPECT_LT(sum_of(before), 32);  // the header, and what the system reads ahead of it
  moe::prefetch(mapped, std::vector<Index>{5, 11});
  const std::vector<double> after = moe::residency(mapped);
  EXPECT_EQ(after[5], 1.0);
  EXPECT_EQ(after[11], 1.0);
  EXPECT_LT(sum_of(after), 48);
  EXPECT_THROW(moe::prefetch(mapped, std::vector<Index>{3, 64}), std::invalid_argument);
}

// The proportional share of the mappings of a file in this process's memory, in KB; -1 where it is not known.
long pss_of(const std::filesystem::path& path) {
  std::ifstream maps("/proc/self/smaps");
  long sum = -1;
  bool here = false;
  for (std::string line; std::getline(maps, line);) {
    const std::size_t colon = line.find(':');
    if (colon == std::string::npos || line.find('-') < colon)  // a mapping begins
      here = line.find(path.string()) != std::string::npos;
    if (here && line.starts_with("Pss:")) sum = std::max(sum, 0L) + std::stol(line.substr(4));
  }
  return sum;
}

TEST(PackedPages, ProcessesShareThem) {
  const TemporaryDirectory directory;
  const std::filesystem::path path = directory / "layer";
  moe::save_packed(path, large_layer());
  const auto mapped = moe::map_packed<Layer, moe::F32>(path);
  std::vector<Index> all(64);
  std::iota(all.begin(), all.end(), Index(0));
  moe::prefetch(mapped, all);
  const long alone = pss_of(path);
  if (alone < 48 * 1024) GTEST_SKIP() << "Pss is " << alone << " KB";
  int to_child[2], to_parent[2];
  ASSERT_EQ(::pipe(to_child), 0);
  ASSERT_EQ(::pipe(to_parent), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  char byte = 0;
  if (child == 0) {  // maps the file itself, and waits
    ::close(to_child[1]);
    const auto own = moe::map_packed<Layer, moe::F32>(path);
    moe::prefetch(own, all);
    if (::write(to_parent[1], &byte, 1) != 1) ::_exit(1);
    while (::read(to_child[0], &byte, 1) > 0) {
    }
    ::_exit(0);
  }
  ::close(to_child[0]);
  const bool told = ::read(to_parent[0], &byte, 1) == 1;
  const long shared = pss_of(path);
  ::close(to_child[1]);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ::close(to_parent[0]);
  ::close(to_parent[1]);
  ASSERT_TRUE(told);
  EXPECT_LT(shared, alone * 3 / 5);  // about half or a third of it
}

#endif

}  // namespace
}  // namespace packed_file_test
