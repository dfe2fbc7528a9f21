//! Plots as inline SVG: lines over an axis, and bars with whiskers. No script, no font, nothing to fetch.

use std::fmt::Write;

/// One line of a plot.
pub struct Line<'a> {
    pub name: &'a str,
    pub points: Vec<(f64, f64)>,
}

/// One bar of a plot: the median, and from where to where the rounds lay.
pub struct Bar<'a> {
    pub name: &'a str,
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

const COLORS: [&str; 8] = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563"];
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 40.0;

/// Lines; `x_label` turns an x into the words under the axis.
pub fn lines(title: &str, lines: &[Line<'_>], x_label: impl Fn(f64) -> String) -> String {
    let points = || lines.iter().flat_map(|line| &line.points);
    let x_max = points().map(|point| point.0).fold(1e-9, f64::max);
    let y_max = points().map(|point| point.1).fold(1e-9, f64::max) * 1.05;
    let x_at = |x: f64| LEFT + x / x_max * (WIDTH - LEFT - RIGHT);
    let y_at = |y: f64| HEIGHT - BOTTOM - y / y_max * (HEIGHT - TOP - BOTTOM);
    let mut svg = open(title, HEIGHT);
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        let (x, y) = (x_at(x_max * share), y_at(y_max * share));
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            y + 4.0,
            short(y_max * share),
            HEIGHT - BOTTOM + 16.0,
            escape(&x_label(x_max * share)),
        );
    }
    for (index, line) in lines.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let path: Vec<String> =
            line.points.iter().map(|point| format!("{:.1},{:.1}", x_at(point.0), y_at(point.1))).collect();
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\" points=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{}\" fill=\"{color}\">{}</text>",
            path.join(" "),
            LEFT + 130.0 * index as f64,
            HEIGHT - 6.0,
            escape(line.name),
        );
    }
    svg + "</svg>"
}

/// Horizontal bars, in the order given.
pub fn bars(title: &str, unit: &str, bars: &[Bar<'_>]) -> String {
    const ROW: f64 = 26.0;
    let height = TOP + ROW * bars.len() as f64 + 8.0;
    let left = 120.0;
    let max = bars.iter().map(|bar| bar.high.max(bar.value)).fold(1e-9, f64::max);
    let at = |value: f64| left + value.max(0.0) / max * (WIDTH - left - 110.0);
    let mut svg = open(&format!("{title} ({unit})"), height);
    for (index, bar) in bars.iter().enumerate() {
        let y = TOP + ROW * index as f64;
        let middle = y + 9.0;
        let _ = write!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect x=\"{left}\" y=\"{y}\" width=\"{:.1}\" height=\"18\" fill=\"{}\"/>\
             <line class=\"whisker\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{}</text>",
            left - 8.0,
            y + 13.0,
            escape(bar.name),
            at(bar.value) - left,
            COLORS[index % COLORS.len()],
            at(bar.low),
            at(bar.high),
            at(bar.high.max(bar.value)) + 6.0,
            y + 13.0,
            short(bar.value),
        );
    }
    svg + "</svg>"
}

/// A page around `body` that needs nothing else.
pub fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title><style>\
         body{{font:15px/1.5 system-ui,sans-serif;max-width:1360px;margin:2em auto;padding:0 1em;color:#111}}\
         table{{border-collapse:collapse;margin:1em 0}}td,th{{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}}\
         td:first-child,th:first-child{{text-align:left}}svg{{max-width:100%;margin:.5em}}\
         pre{{background:#f6f6f6;padding:1em;overflow:auto}}</style></head><body><h1>{title}</h1>{body}</body></html>\n",
        title = escape(title)
    )
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number with three digits that matter.
pub fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 1e6 => format!("{:.2}M", value / 1e6),
        size if size >= 1e5 => format!("{:.0}k", value / 1e3),
        size if size >= 1e4 => format!("{:.1}k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn open(title: &str, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\">\
         <style>text{{font:11px system-ui,sans-serif}}.title{{font-size:14px;font-weight:600}}\
         .grid{{stroke:#ddd}}.whisker{{stroke:#111;stroke-width:2}}</style>\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/><text class=\"title\" x=\"10\" y=\"20\">{}</text>",
        escape(title)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_stay_within_their_frame_and_escape_names() {
        let svg = lines(
            "a < b",
            &[Line { name: "p&q", points: vec![(0.0, 1.0), (2.0, 4.0)] }, Line { name: "none", points: vec![] }],
            short,
        );
        assert!(svg.contains("a &lt; b") && svg.contains("p&amp;q") && svg.ends_with("</svg>"));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        let svg = bars("cpu", "us", &[Bar { name: "x", value: 2.0, low: 1.0, high: 3.0 }]);
        assert!(svg.contains(">2.00<") && !svg.contains("NaN"));
    }

    #[test]
    fn numbers_keep_three_digits() {
        for (value, text) in
            [(0.0, "0"), (0.1234, "0.123"), (17.36, "17.4"), (12_345.0, "12.3k"), (109_200.0, "109k"), (2.5e6, "2.50M")]
        {
            assert_eq!(short(value), text);
        }
    }
}
