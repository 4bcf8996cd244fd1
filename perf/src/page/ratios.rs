//! The figures beside their targets.

use crate::picture::{Anchor, Panel, Picture, Scale, Svg, WIDTH, digits};
use crate::report::Spread;

const TOP: f64 = 46.0;
const ROW: f64 = 26.0;
/// The place of the marks. The numbers are to the right of them.
const MARKS: (f64, f64) = (330.0, 700.0);
const VALUE: f64 = 800.0;
const TARGET: f64 = WIDTH - 4.0;

/// A figure with its target.
#[derive(Debug, Clone)]
pub(super) struct Aim<'a> {
    pub(super) scenario: &'static str,
    pub(super) name: &'a str,
    pub(super) spread: Spread,
    pub(super) target: Target,
}

/// The target of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    /// Returns how good a value is: 1 just meets the target, and more is better.
    fn goodness(self, value: f64) -> f64 {
        let least = f64::MIN_POSITIVE;
        match self {
            Self::AtLeast(target) => value.max(least) / target.max(least),
            Self::AtMost(target) => target.max(least) / value.max(least),
        }
    }

    pub(super) fn text(self) -> String {
        match self {
            Self::AtLeast(target) => format!("at least {target}"),
            Self::AtMost(target) => format!("at most {target}"),
        }
    }
}

/// Draws a row for each figure; returns `None` if there are none.
pub(super) fn draw(aims: &[Aim<'_>]) -> Option<Picture> {
    let goodness = |aim: &Aim<'_>| {
        let Spread { median, min, max } = aim.spread;
        [median, min, max].map(|value| aim.target.goodness(value))
    };
    let furthest = aims
        .iter()
        .flat_map(goodness)
        .filter(|good| good.is_finite())
        .fold(1.5, |most, good| f64::max(most, if good < 1.0 { 1.0 / good.max(0.01) } else { good }));
    // What is beyond four times is just very good, or very bad.
    let furthest = furthest.min(4.0) * 1.05;
    let bottom = TOP + ROW * aims.len() as f64;
    let panel = Panel {
        x: Scale::logarithmic((1.0 / furthest, furthest), MARKS),
        y: Scale::linear((0.0, 1.0), (bottom, TOP)),
    };
    aims.first()?;
    let mut svg = Svg::default();
    let head = TOP - 16.0;
    svg.text("soft small", Anchor::End, (panel.x.at(1.0) - 6.0, head), "short of the target");
    svg.text("soft small", Anchor::Start, (panel.x.at(1.0) + 6.0, head), "beyond it");
    svg.text("soft small", Anchor::End, (VALUE, head), "median");
    svg.text("soft small", Anchor::End, (TARGET, head), "target");
    let mut before = "";
    for (index, aim) in aims.iter().enumerate() {
        let y = TOP + ROW * (index as f64 + 0.5);
        if before != aim.scenario {
            svg.line("grid", &[(0.0, y - ROW / 2.0), (WIDTH, y - ROW / 2.0)]);
            svg.text("strong", Anchor::Start, (0.0, y + 4.0), aim.scenario);
            before = aim.scenario;
        }
        let [median, least, most] = goodness(aim);
        let class = if median >= 1.0 { "blue" } else { "orange" };
        svg.text("", Anchor::Start, (104.0, y + 4.0), &aim.name.replace('_', " "));
        let ends = [least, most].map(|good| (panel.x.at(good), y));
        svg.line(&format!("s-{class} thick"), &ends);
        svg.dot(&format!("f-{class} ring"), (panel.x.at(median), y), 5.0);
        svg.text("strong", Anchor::End, (VALUE, y + 4.0), &digits(aim.spread.median));
        svg.text("soft", Anchor::End, (TARGET, y + 4.0), &aim.target.text());
    }
    panel.upright(&mut svg, "mark", 1.0);
    let met = aims.iter().filter(|aim| goodness(aim)[0] >= 1.0).count();
    Some(Picture::new(svg, bottom + 8.0, format!("{met} of {} figures meet their targets", aims.len())))
}
