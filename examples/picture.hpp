// SPDX-License-Identifier: MIT
#pragma once

// The picture of train_text: which expert serves what, one panel a model, as an SVG that follows the reader's
// light or dark setting.

#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "report.hpp"

namespace examples {

// A model's experts, in the order in which they are drawn.
struct Panel {
  std::string title;
  std::vector<std::string> experts;
  std::vector<std::vector<double>> counts;  // [expert][class]: tokens
};

// Draws for every panel the share of each class's tokens that an expert serves and, as a bar, its share of
// all.
inline void write_picture(const std::string& path, const std::vector<std::string>& classes,
                          const std::vector<Panel>& panels) {
  constexpr double kCell = 28, kHigh = 18, kLeft = 62, kTop = 96, kBar = 80, kGap = 24;
  const double columns = double(classes.size());
  const double panel_width = kLeft + kCell * columns + kBar + kGap;
  std::size_t most = 0;
  for (const Panel& panel : panels) most = std::max(most, panel.experts.size());
  const double width = panel_width * double(panels.size()), height = kTop + kHigh * double(most) + 2;

  std::ostringstream svg;
  const auto text = [&](double x, double y, const char* kind, const std::string& what) {
    svg << "<text x=\"" << fixed(x, 1) << "\" y=\"" << fixed(y, 1) << "\" class=\"" << kind << "\">" << what
        << "</text>\n";
  };
  const auto bar = [&](double x, double y, double wide, double share, const char* kind) {
    svg << "<rect x=\"" << fixed(x, 1) << "\" y=\"" << fixed(y, 1) << "\" width=\"" << fixed(wide, 1)
        << "\" height=\"" << kHigh - 2 << "\" class=\"" << kind << "\" fill-opacity=\"" << fixed(share, 3)
        << "\"/>\n";
  };
  svg << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << width << ' ' << height << "\" width=\""
      << width << "\" height=\"" << height << "\" role=\"img\">\n"
      << R"(<style>
text { font: 12px system-ui, sans-serif; fill: #5d5c57; }
.title { font-size: 14px; fill: #1c1c1a; }
.empty { fill: #eceae4; }
.cell { fill: #1c5cab; }
.load { fill: #c2570c; }
@media (prefers-color-scheme: dark) {
  text { fill: #aba9a1; }
  .title { fill: #eeede8; }
  .empty { fill: #2c2c2a; }
  .cell { fill: #6da7ec; }
  .load { fill: #e8803a; }
}
</style>
)";
  double left = 0;
  for (const Panel& panel : panels) {
    std::vector<double> of_class(classes.size());
    double all = 0;
    for (const auto& row : panel.counts)
      for (std::size_t i = 0; i < row.size(); ++i) {
        of_class[i] += row[i];
        all += row[i];
      }
    text(left, 14, "title", panel.title);
    for (std::size_t i = 0; i < classes.size(); ++i)
      svg << "<text transform=\"translate(" << fixed(left + kLeft + kCell * (double(i) + 0.5), 1) << ' '
          << kTop - 8 << ") rotate(-45)\">" << classes[i] << "</text>\n";
    const double bars = left + kLeft + kCell * columns + 8;
    text(bars, kTop - 8, "", "all");
    for (std::size_t e = 0; e < panel.experts.size(); ++e) {
      const double y = kTop + kHigh * double(e);
      text(left, y + 13, "", panel.experts[e]);
      double sum = 0;
      for (std::size_t i = 0; i < classes.size(); ++i) {
        const double count = panel.counts[e][i], x = left + kLeft + kCell * double(i);
        sum += count;
        bar(x, y, kCell - 2, 1, "empty");
        bar(x, y, kCell - 2, of_class[i] > 0 ? count / of_class[i] : 0, "cell");
      }
      const double share = all > 0 ? sum / all : 0;
      bar(bars, y, kBar * share, 1, "load");
      text(bars + kBar * share + 4, y + 13, "", fixed(100 * share, 0) + "%");
    }
    left += panel_width;
  }
  svg << "</svg>\n";
  std::ofstream file(path, std::ios::binary);
  file << svg.str();
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

}  // namespace examples
