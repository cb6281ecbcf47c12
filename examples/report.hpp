// SPDX-License-Identifier: MIT
#pragma once

// report.html of train_text: one file without references to others, drawn as inline SVG. Colours
// follow the reader's light or dark setting; numbers appear where the mouse points.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace examples {

inline std::string fixed(double value, int digits) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.*f", digits, value);
  return buffer;
}

// 1234567 as 1,234,567.
inline std::string grouped(long long value) {
  const std::string digits = std::to_string(value);
  std::string result;
  for (std::size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && digits[i - 1] != '-' && (digits.size() - i) % 3 == 0) result += ',';
    result += digits[i];
  }
  return result;
}

inline std::string padded(std::string what, std::size_t width) {
  what.resize(std::max(what.size(), width), ' ');
  return what;
}

struct Report {
  // A line of the chart of loss curves. Lines of one colour belong together.
  struct Line {
    std::string name;
    int color = 0;  // 0 to 5
    bool dashed = false;
    std::vector<double> x, y;
  };
  // counts[row][column]; drawn are the shares of each row. The last row is the sum of the others.
  struct HeatMap {
    std::string title, row_title, column_title;
    std::vector<std::string> rows, columns;
    std::vector<std::vector<double>> counts;
  };
  struct Table {
    std::string title;
    std::vector<std::string> header;
    std::vector<std::vector<std::string>> rows;
  };

  std::string title;
  std::vector<std::string> settings;
  std::vector<Table> tables;
  std::string chart_title, x_title, y_title, chart_note;
  std::vector<Line> lines;
  std::vector<HeatMap> heat_maps;
  std::vector<std::string> notes;

  void write(const std::string& path) const {
    std::ostringstream html;
    html << kHead << "<title>" << escaped(title) << "</title>\n" << kStyle << "</head><body>\n";
    html << "<h1>" << escaped(title) << "</h1>\n<p>";
    for (const std::string& line : settings) html << escaped(line) << "<br>\n";
    html << "</p>\n";
    for (const Table& table : tables) write_table(html, table);
    html << "<ul>\n";
    for (const std::string& note : notes) html << "<li>" << escaped(note) << "</li>\n";
    html << "</ul>\n";
    write_chart(html);
    html << "<div class=maps>\n";
    for (const HeatMap& map : heat_maps) write_heat_map(html, map);
    html << "</div>\n";
    html << "</body></html>\n";
    std::ofstream file(path, std::ios::binary);
    file << html.str();
    file.close();
    if (!file) throw std::runtime_error("cannot write " + path);
  }

 private:
  static std::string escaped(const std::string& text) {
    std::string result;
    for (const char c : text) {
      if (c == '&')
        result += "&amp;";
      else if (c == '<')
        result += "&lt;";
      else if (c == '>')
        result += "&gt;";
      else if (c == '"')
        result += "&quot;";
      else
        result += c;
    }
    return result;
  }

  static void text(std::ostream& svg, double x, double y, const char* style, const std::string& what) {
    svg << "<text x=\"" << fixed(x, 1) << "\" y=\"" << fixed(y, 1) << "\" class=\"" << style << "\">"
        << escaped(what) << "</text>\n";
  }

  static void write_table(std::ostream& html, const Table& table) {
    html << "<h2>" << escaped(table.title) << "</h2>\n<div class=wide><table><tr>";
    for (const std::string& cell : table.header) html << "<th>" << escaped(cell) << "</th>";
    html << "</tr>\n";
    for (const auto& row : table.rows) {
      html << "<tr>";
      for (const std::string& cell : row) html << "<td>" << escaped(cell) << "</td>";
      html << "</tr>\n";
    }
    html << "</table></div>\n";
  }

  void write_chart(std::ostream& html) const {
    constexpr double kWidth = 860, kHeight = 400, kLeft = 60, kRight = 16, kTop = 14, kBottom = 46;
    double x_most = 1, y_least = 1e30, y_most = 0, y_top = 0;
    for (const Line& line : lines)
      for (const double x : line.x) x_most = std::max(x_most, x);
    // The steep begin may leave the picture at its top.
    for (const Line& line : lines) {
      for (std::size_t i = 0; i < line.x.size(); ++i) {
        y_least = std::min(y_least, line.y[i]);
        y_top = std::max(y_top, line.y[i]);
        if (line.x[i] >= x_most / 10) y_most = std::max(y_most, line.y[i]);
      }
    }
    const double unit = y_most - y_least > 3 ? 1 : y_most - y_least > 1 ? 0.5 : 0.1;
    y_least = std::floor(y_least / unit) * unit;
    y_most = std::max(std::ceil(y_most / unit) * unit, y_least + unit);
    const auto at_x = [&](double x) { return kLeft + x / x_most * (kWidth - kLeft - kRight); };
    const auto at_y = [&](double y) {
      return kTop + (y_most - y) / (y_most - y_least) * (kHeight - kTop - kBottom);
    };

    html << "<h2>" << escaped(chart_title) << "</h2>\n<div class=legend>";
    for (const Line& line : lines)
      html << "<span><svg width=28 height=10><line x1=0 y1=5 x2=28 y2=5 class=\"line c" << line.color
           << (line.dashed ? " dashed" : "") << "\"/></svg> " << escaped(line.name) << "</span>";
    html << "</div>\n<div class=wide><svg viewBox=\"0 0 " << kWidth << ' ' << kHeight
         << "\" class=chart role=img aria-label=\"" << escaped(chart_title) << "\">\n";
    for (double y = y_least; y < y_most + unit / 2; y += unit) {
      html << "<line class=grid x1=" << kLeft << " x2=" << kWidth - kRight << " y1=" << fixed(at_y(y), 1)
           << " y2=" << fixed(at_y(y), 1) << " />\n";
      text(html, kLeft - 8, at_y(y) + 4, "tick end", fixed(y, 1));
    }
    for (int i = 0; i <= 4; ++i)
      text(html, at_x(x_most * i / 4), kHeight - kBottom + 20, i == 4 ? "tick end" : "tick middle",
           grouped(std::llround(x_most * i / 4)));
    text(html, (kLeft + kWidth - kRight) / 2, kHeight - 6, "axis middle", x_title);
    html << "<text class=\"axis middle\" transform=\"translate(16," << (kTop + kHeight - kBottom) / 2
         << ") rotate(-90)\">" << escaped(y_title) << "</text>\n";
    html << "<clipPath id=plot><rect x=" << kLeft << " y=" << kTop << " width=" << kWidth - kLeft - kRight
         << " height=" << kHeight - kTop - kBottom << " /></clipPath>\n<g clip-path=\"url(#plot)\">\n";
    for (const Line& line : lines) {
      html << "<polyline class=\"line c" << line.color << (line.dashed ? " dashed" : "") << "\" points=\"";
      for (std::size_t i = 0; i < line.x.size(); ++i)
        html << fixed(at_x(line.x[i]), 1) << ',' << fixed(at_y(line.y[i]), 1) << ' ';
      html << "\"/>\n";
    }
    for (const Line& line : lines)
      for (std::size_t i = 0; i < line.x.size(); ++i)
        html << "<circle class=\"dot c" << line.color << "\" cx=" << fixed(at_x(line.x[i]), 1)
             << " cy=" << fixed(at_y(line.y[i]), 1) << " r=6><title>" << escaped(line.name) << ", step "
             << grouped(std::llround(line.x[i])) << ": " << fixed(line.y[i], 3) << "</title></circle>\n";
    html << "</g></svg></div>\n<p class=note>";
    if (y_top > y_most) html << "The chart is cut at " << fixed(y_most, 1) << ". ";
    html << escaped(chart_note) << "</p>\n";
  }

  static void write_heat_map(std::ostream& html, const HeatMap& map) {
    constexpr double kCellHeight = 24, kLeft = 116, kTop = 92;
    const double cell = std::clamp(400.0 / double(map.columns.size()), 40.0, 64.0);
    const double width = kLeft + cell * double(map.columns.size()) + 66;
    const double height = kTop + kCellHeight * double(map.rows.size()) + 14;
    html << "<figure><h2>" << escaped(map.title) << "</h2>\n<svg viewBox=\"0 0 " << width << ' ' << height
         << "\" width=" << width << " height=" << height << " role=img aria-label=\"" << escaped(map.title)
         << "\">\n";
    text(html, kLeft + cell * double(map.columns.size()) / 2, 14, "axis middle", map.column_title);
    text(html, 0, kTop - 10, "axis", map.row_title);
    for (std::size_t column = 0; column < map.columns.size(); ++column)
      html << "<text class=tick transform=\"translate(" << fixed(kLeft + cell * (double(column) + 0.5), 1)
           << ',' << kTop - 8 << ") rotate(-35)\">" << escaped(map.columns[column]) << "</text>\n";
    for (std::size_t row = 0; row < map.rows.size(); ++row) {
      const double gap = row + 1 == map.rows.size() ? 6 : 0;  // before the sum of all
      const double y = kTop + kCellHeight * double(row) + gap;
      double total = 0;
      for (const double count : map.counts[row]) total += count;
      text(html, 0, y + 16, "tick", map.rows[row]);
      for (std::size_t column = 0; column < map.columns.size(); ++column) {
        const double share = total > 0 ? map.counts[row][column] / total : 0;
        const double x = kLeft + cell * double(column);
        html << "<g><title>" << escaped(map.rows[row]) << ", " << escaped(map.columns[column]) << ": "
             << grouped(std::llround(map.counts[row][column])) << " of " << grouped(std::llround(total))
             << " tokens, " << fixed(100 * share, 1) << "%</title><rect class=empty x=" << fixed(x, 1)
             << " y=" << y << " width=" << fixed(cell - 2, 1) << " height=" << kCellHeight - 2
             << " /><rect class=cell fill-opacity=" << fixed(share, 3) << " x=" << fixed(x, 1) << " y=" << y
             << " width=" << fixed(cell - 2, 1) << " height=" << kCellHeight - 2 << " />";
        if (share >= 0.005)
          html << "<text class=\"value middle" << (share > 0.75 ? " on" : "")
               << "\" x=" << fixed(x + cell / 2 - 1, 1) << " y=" << y + 15 << ">" << fixed(100 * share, 0)
               << "</text>";
        html << "</g>\n";
      }
    }
    // The legend: from none to all of a row.
    const double x = kLeft + cell * double(map.columns.size()) + 14;
    for (int i = 0; i <= 4; ++i) {
      html << "<rect class=empty x=" << x << " y=" << kTop + 20 * i << " width=14 height=20 />"
           << "<rect class=cell fill-opacity=" << fixed(i / 4.0, 2) << " x=" << x << " y=" << kTop + 20 * i
           << " width=14 height=20 />\n";
      text(html, x + 18, kTop + 20 * i + 14, "tick", std::to_string(25 * i) + "%");
    }
    html << "</svg></figure>\n";
  }

  static constexpr const char* kHead =
      "<!DOCTYPE html>\n<html lang=en><head><meta charset=utf-8>\n"
      "<meta name=viewport content=\"width=device-width\">\n";
  static constexpr const char* kStyle = R"(<style>
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1c1c1a; --soft: #5d5c57; --rule: #dddcd6;
  --empty: #f0efeb; --cell: #1c5cab; --on: #fff;
  --c0: #2a78d6; --c1: #c2570c; --c2: #1a8a63; --c3: #8a4fc7; --c4: #b5336e; --c5: #7a6a10; }
@media (prefers-color-scheme: dark) { :root { --page: #1a1a19; --ink: #eeede8; --soft: #aba9a1;
  --rule: #3a3a37; --empty: #262624; --cell: #6da7ec; --on: #101010;
  --c0: #5598e7; --c1: #e8803a; --c2: #3fb68b; --c3: #b283ea; --c4: #e070a0; --c5: #c9b440; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
.note { color: var(--soft); max-width: 56rem; }
.wide { overflow-x: auto; } .chart { width: 100%; max-width: 900px; min-width: 560px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .9rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { color: var(--soft); font-weight: 500; }
.legend span { margin-right: 1.4rem; color: var(--soft); white-space: nowrap; }
.maps { display: flex; flex-wrap: wrap; gap: 0 1rem; } ul { padding-left: 1.2rem; max-width: 56rem; }
figure { margin: 0; overflow-x: auto; }
svg text { fill: var(--soft); font-size: 12px; } svg .axis { fill: var(--ink); }
.middle { text-anchor: middle; } .end { text-anchor: end; }
svg .value { fill: var(--ink); font-size: 11px; } svg .value.on { fill: var(--on); }
.grid { stroke: var(--rule); } .line { fill: none; stroke-width: 2; }
.dashed { stroke-dasharray: 5 4; stroke-width: 1.5; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
.dot { fill: transparent; stroke: none; } .dot:hover { fill: var(--ink); }
.empty { fill: var(--empty); } .cell { fill: var(--cell); }
</style>
)";
};

}  // namespace examples
