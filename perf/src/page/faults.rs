//! The time that the guest waited for pages in post-copy, beside the least that the network takes.

use crate::picture::{Anchor, LINE, Panel, Picture, Scale, Svg, Unit, WIDTH, width_of};
use crate::report::Waits;

const RIGHT: f64 = WIDTH - 60.0;
const TOP: f64 = 40.0;
/// The height of one distribution, and of the room below it.
const EACH: f64 = 96.0;
const GAP: f64 = 34.0;

/// The distribution of the times that pages of one kind took.
#[derive(Debug, Clone)]
pub(super) struct Distribution {
    pub(super) name: String,
    /// Whether this is the least that is possible, and not what was measured of Memlane.
    pub(super) limit: bool,
    pub(super) waits: Waits,
    /// The time in seconds within which half of the pages came.
    pub(super) p50: f64,
    /// The time in seconds within which 99 of 100 pages came.
    pub(super) p99: f64,
}

/// Draws each distribution above the next, on one axis; returns `None` if there were no pages.
pub(super) fn draw(distributions: &[Distribution]) -> Option<Picture> {
    let seen: Vec<&Distribution> = distributions.iter().filter(|of| of.waits.total() > 0).collect();
    let ends = seen.iter().filter_map(|of| of.waits.ends());
    let (from, to) = ends.reduce(|one, other| (one.0.min(other.0), one.1.max(other.1)))?;
    let x = Scale::logarithmic((from, to), (8.0, RIGHT));
    let mut svg = Svg::default();
    svg.text("title", Anchor::Start, (0.0, TOP - 24.0), "How long a page takes");
    let rest = "share of all that took so long; the axis is logarithmic";
    svg.text("soft", Anchor::Start, (158.0, TOP - 24.0), rest);
    let mut bottom = TOP;
    for (index, of) in seen.iter().enumerate() {
        let top = bottom + if index == 0 { LINE } else { GAP };
        bottom = top + EACH;
        let densities = of.waits.densities();
        let highest = densities.iter().map(|(_, density)| *density).fold(1e-9, f64::max);
        one(&mut svg, &Panel { x, y: Scale::linear((0.0, highest), (bottom, top)) }, of, &densities);
    }
    let axis = Panel { x, y: Scale::linear((0.0, 1.0), (bottom, TOP)) };
    axis.columns(&mut svg, Unit::Seconds, 8);
    let tells: Vec<String> = (seen.iter())
        .map(|of| {
            let (p50, p99) = (Unit::Seconds.text(of.p50), Unit::Seconds.text(of.p99));
            format!("{}: {} pages, half within {p50}, 99 of 100 within {p99}", of.name, of.waits.total())
        })
        .collect();
    Some(Picture::new(svg, bottom + 30.0, tells.join("; ")))
}

fn one(svg: &mut Svg, panel: &Panel, of: &Distribution, densities: &[(f64, f64)]) {
    let colour = if of.limit { "soft" } else { "purple" };
    panel.level(svg, "axis", 0.0);
    panel.filled_steps(svg, &format!("w-{colour}"), densities);
    panel.steps(svg, &format!("s-{colour} thin"), densities);
    let name = format!("{}, {} pages", of.name, of.waits.total());
    svg.text("strong", Anchor::Start, (panel.left(), panel.top() + 2.0), &name);
    let top = panel.top();
    for (value, name) in [(of.p50, "half"), (of.p99, "99 of 100")] {
        let x = panel.x.at(value);
        svg.line("mark", &[(x, top + 14.0), (x, panel.bottom())]);
        let text = format!("{name} within {}", Unit::Seconds.text(value));
        // Half stands to the left of its line, and nearly all to the right, one line lower if there is no room.
        let fits = x + width_of(&text) < WIDTH;
        match name {
            "half" => svg.text("", Anchor::End, (x - 5.0, top + 24.0), &text),
            _ if fits => svg.text("", Anchor::Start, (x + 5.0, top + 24.0), &text),
            _ => svg.text("", Anchor::End, (x - 5.0, top + 24.0 + LINE), &text),
        }
    }
}
