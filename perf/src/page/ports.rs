//! The traffic of the ports from moment to moment.

use super::guest::whole;
use crate::picture::{Anchor, GUTTER, Panel, Picture, Scale, Svg, Unit, WIDTH};
use crate::timeline::{Course, PortLine, TimeSpan, Timeline};

const RIGHT: f64 = WIDTH - 190.0;
const TOP: f64 = 34.0;
/// The height of the panel of all ports together, of the panel of a single port, and of the room between them.
const TOTAL: f64 = 130.0;
const EACH: f64 = 48.0;
const GAP: f64 = 14.0;
/// The shortest span over which rates are shown, in seconds: ports are looked at fifty times a second.
const SHORTEST: f64 = 0.04;
/// The largest number of ports that are shown one by one. If there are more, only all of them together are shown.
const MOST: usize = 16;

/// A port, as it is shown.
struct Row<'a> {
    name: &'a str,
    /// The bits a second, from each time until the next.
    rates: Vec<(f64, f64)>,
    bytes: f64,
}

/// Draws all ports together, and each by itself; returns `None` if the ports were not looked at.
pub(super) fn draw(timeline: &Timeline) -> Option<Picture> {
    let span = timeline.span()?;
    let course = &timeline.course;
    let shown = whole(span, course);
    let step = SHORTEST.max(shown.seconds() / 300.0);
    let rows = timeline.ports.iter().map(|port| Row::of(port, shown, step));
    let ports: Vec<Row<'_>> = rows.filter(|row| !row.rates.is_empty()).collect();
    let total = sum(&ports);
    if total.is_empty() {
        return None;
    }
    let sent: f64 = ports.iter().map(|row| row.bytes).sum();

    let mut svg = Svg::default();
    let x = Scale::linear((shown.from, shown.to), (GUTTER, RIGHT));
    let mut bottom = TOP + TOTAL;
    let all = Panel { x, y: Scale::from_zero(total.iter().map(|(_, rate)| *rate), (bottom, TOP)) };
    all.title(&mut svg, "All ports", "bits on the wire a second, headers included");
    all.rows(&mut svg, Unit::BitsPerSecond, 4);
    marks(&mut svg, &all, course);
    all.filled_steps(&mut svg, "w-blue", &total);
    all.steps(&mut svg, "s-blue", &total);
    let text = |bytes: f64| format!("{} in all", Unit::Bytes.text(bytes));
    svg.text("", Anchor::Start, (RIGHT + 12.0, TOP + 12.0), &text(sent));
    name_marks(&mut svg, &all, timeline);

    let alone = ports.len() == 1 || ports.len() > MOST;
    let most = ports.iter().flat_map(|row| &row.rates).map(|(_, rate)| *rate).fold(0.0, f64::max);
    for Row { name, rates, bytes } in ports.iter().filter(|_| !alone) {
        let top = bottom + GAP;
        bottom = top + EACH;
        let panel = Panel { x, y: Scale::linear((0.0, most), (bottom, top)) };
        marks(&mut svg, &panel, course);
        panel.level(&mut svg, "axis", 0.0);
        panel.filled_steps(&mut svg, "w-blue", rates);
        panel.steps(&mut svg, "s-blue thin", rates);
        svg.text("", Anchor::End, (GUTTER - 8.0, bottom - 2.0), name);
        svg.text("", Anchor::Start, (RIGHT + 12.0, bottom - 20.0), &Unit::Bytes.text(*bytes));
        let share = format!("{} of all", Unit::Percent.text(bytes / sent.max(1.0)));
        svg.text("soft small", Anchor::Start, (RIGHT + 12.0, bottom - 5.0), &share);
    }
    let last = Panel { x, y: Scale::linear((0.0, 1.0), (bottom, TOP)) };
    last.columns(&mut svg, Unit::Seconds, 8);
    last.below(&mut svg, "since the order");
    Some(Picture::new(svg, bottom + 44.0, tells(&ports, sent)))
}

impl<'a> Row<'a> {
    fn of(port: &'a PortLine, shown: TimeSpan, step: f64) -> Self {
        let rates = port.rates(step).into_iter().filter(|(at, _)| (shown.from..=shown.to).contains(at));
        let rates = rates.map(|(at, bytes)| (at, bytes * 8.0)).collect();
        Self { name: &port.name, rates, bytes: port.bytes(shown) as f64 }
    }
}

/// Adds up the rates of all ports, which are looked at at the same times.
fn sum(ports: &[Row<'_>]) -> Vec<(f64, f64)> {
    let Some(first) = ports.first() else { return Vec::new() };
    let at = |index: usize| ports.iter().filter_map(|row| row.rates.get(index)).map(|(_, rate)| rate).sum();
    first.rates.iter().enumerate().map(|(index, (seconds, _))| (*seconds, at(index))).collect()
}

fn marks(svg: &mut Svg, panel: &Panel, course: &Course) {
    if let Some(pause) = course.pause {
        panel.band(svg, "w-orange", (pause.from, pause.to));
    }
}

fn name_marks(svg: &mut Svg, panel: &Panel, timeline: &Timeline) {
    for note in &timeline.notes {
        let x = panel.x.at(note.seconds);
        panel.upright(svg, "dash", note.seconds);
        svg.text("small soft", Anchor::Start, (x + 4.0, panel.bottom() - 8.0), &note.text);
    }
    if let Some(pause) = timeline.course.pause {
        let x = panel.x.at(pause.from);
        svg.text("small t-orange", Anchor::End, (x - 4.0, panel.top() - 3.0), "pause");
    }
}

fn tells(ports: &[Row<'_>], sent: f64) -> String {
    let share = |row: &Row<'_>| format!("{} {}", row.name, Unit::Percent.text(row.bytes / sent.max(1.0)));
    let shares: Vec<String> = ports.iter().map(share).collect();
    format!("Rates of the ports over time; {} in all: {}", Unit::Bytes.text(sent), shares.join(", "))
}
