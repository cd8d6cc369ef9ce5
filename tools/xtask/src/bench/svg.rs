//! A chart of lines as SVG.

use std::fmt::Write;

/// One line of a chart.
pub struct Line {
    /// In the legend.
    pub name: &'static str,
    /// Its stroke.
    pub color: &'static str,
    /// Drawn with gaps.
    pub dashed: bool,
    /// One for each label.
    pub values: Vec<f64>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 50.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 340.0;
const RIGHT: f64 = 540.0;

/// Draws lines over equally spaced labels, from 0 to a little above the largest value.
pub fn chart(title: &str, axis: &str, labels: &[String], lines: &[Line]) -> String {
    let max = lines.iter().flat_map(|line| &line.values).fold(1.0_f64, |a, b| a.max(*b));
    let steps = (max * 4.0).ceil().max(1.0);
    let x = |i: usize| LEFT + (RIGHT - LEFT) * i as f64 / (labels.len().max(2) - 1) as f64;
    let y = |value: f64| BOTTOM - (BOTTOM - TOP) * value * 4.0 / steps;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"13\">{title}</text>\n"
    );
    // Writing to a string does not fail.
    for step in 0..=steps as u32 {
        let value = f64::from(step) / 4.0;
        let at = y(value);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{RIGHT}\" y2=\"{at:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value:.2}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (i, label) in labels.iter().enumerate() {
        let at = x(i);
        let _ = writeln!(
            out,
            "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
            BOTTOM + 18.0
        );
    }
    let middle = f64::midpoint(LEFT, RIGHT);
    let _ =
        writeln!(out, "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{axis}</text>", BOTTOM + 42.0);
    for (row, line) in lines.iter().enumerate() {
        let points: Vec<String> =
            line.values.iter().enumerate().map(|(i, v)| format!("{:.1},{:.1}", x(i), y(*v))).collect();
        let dash = if line.dashed { " stroke-dasharray=\"6 4\"" } else { "" };
        let style = format!("fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{dash}", line.color);
        let (left, at) = (RIGHT + 20.0, TOP + 20.0 * row as f64);
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" {style}/>\n<line x1=\"{left}\" y1=\"{at}\" x2=\"{}\" y2=\"{at}\" {style}/>\
             <text x=\"{}\" y=\"{}\">{}</text>",
            points.join(" "),
            left + 24.0,
            left + 30.0,
            at + 4.0,
            line.name
        );
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_drawn_to_scale() {
        let line = Line { name: "one", color: "red", dashed: false, values: vec![0.0, 1.0] };
        let drawn = chart("title", "axis", &["a".to_owned(), "b".to_owned()], &[line]);
        assert!(drawn.contains("points=\"50.0,340.0 540.0,40.0\""), "{drawn}");
    }
}
