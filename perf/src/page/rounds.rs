//! The rounds: what each had to send, what the guest wrote meanwhile, and how fast either went.

use crate::picture::{Anchor, GUTTER, LINE, Panel, Picture, Scale, Svg, Unit, WIDTH, spread};
use crate::timeline::{Course, RoundSpan};

const TOP: f64 = 40.0;
const BOTTOM: f64 = 230.0;
const HEIGHT: f64 = 276.0;
/// The place where the panel of bytes ends, and that of rates begins and ends.
const BYTES: f64 = 400.0;
const RATES: (f64, f64) = (590.0, WIDTH - 120.0);

/// A line that shows one value of each round.
struct RoundLine {
    colour: &'static str,
    name: &'static str,
    value: fn(&RoundSpan) -> f64,
}

const BYTE_LINES: [RoundLine; 2] = [
    RoundLine { colour: "blue", name: "sent", value: |round| round.sent },
    RoundLine { colour: "orange", name: "dirtied meanwhile", value: |round| round.dirtied },
];

const RATE_LINES: [RoundLine; 2] = [
    RoundLine { colour: "blue", name: "sent", value: |round| round.sent * 8.0 / round.span.seconds() },
    RoundLine {
        colour: "orange",
        name: "dirtied",
        value: |round| round.dirtied * 8.0 / round.span.seconds(),
    },
];

/// Draws both panels; returns `None` if there was no round.
pub(super) fn draw(course: &Course) -> Option<Picture> {
    let rounds: Vec<&RoundSpan> = course.rounds.iter().filter(|round| round.span.seconds() > 0.0).collect();
    let (first, last) = (rounds.first()?, rounds.last()?);
    let mut svg = Svg::default();
    let numbers = (f64::from(first.number) - 0.5, f64::from(last.number) + 0.5);

    let largest = all(&rounds, &BYTE_LINES).fold(0.0, f64::max);
    let smallest = all(&rounds, &BYTE_LINES).filter(|bytes| *bytes > 0.0).fold(largest, f64::min);
    let decades =
        (10f64.powf(smallest.max(1.0).log10().floor()), 10f64.powf(largest.max(10.0).log10().ceil()));
    let bytes =
        Panel { x: Scale::linear(numbers, (GUTTER, BYTES)), y: Scale::logarithmic(decades, (BOTTOM, TOP)) };
    bytes.title(&mut svg, "Each round", "bytes, each line of the grid ten times the one below");
    lines(&mut svg, &bytes, &rounds, &BYTE_LINES, Unit::Bytes);

    let rates = Panel {
        x: Scale::linear(numbers, RATES),
        y: Scale::from_zero(all(&rounds, &RATE_LINES), (BOTTOM, TOP)),
    };
    rates.title(&mut svg, "How fast", "bits a second, over the round");
    lines(&mut svg, &rates, &rounds, &RATE_LINES, Unit::BitsPerSecond);
    let tells = format!(
        "{} rounds; the first sent {} in {}, the last {} in {}, and {} were left",
        rounds.len(),
        Unit::Bytes.text(first.sent),
        Unit::Seconds.text(first.span.seconds()),
        Unit::Bytes.text(last.sent),
        Unit::Seconds.text(last.span.seconds()),
        Unit::Bytes.text(last.dirtied),
    );
    Some(Picture::new(svg, HEIGHT, tells))
}

fn all<'a>(rounds: &'a [&RoundSpan], lines: &'a [RoundLine]) -> impl Iterator<Item = f64> + 'a {
    lines.iter().flat_map(|line| rounds.iter().map(|round| (line.value)(round)))
}

fn lines(svg: &mut Svg, panel: &Panel, rounds: &[&RoundSpan], lines: &[RoundLine], unit: Unit) {
    panel.rows(svg, unit, 4);
    panel.whole_columns(svg);
    panel.below(svg, "round");
    let ends: Vec<(f64, f64)> = (lines.iter())
        .filter_map(|line| rounds.last().map(|round| panel.at(f64::from(round.number), (line.value)(round))))
        .collect();
    let wanted: Vec<f64> = ends.iter().map(|(_, y)| *y).collect();
    let places = spread(&wanted, 2.0 * LINE, (TOP + LINE, BOTTOM - 4.0));
    for ((line, end), place) in lines.iter().zip(&ends).zip(places) {
        let values: Vec<(f64, f64)> =
            rounds.iter().map(|round| (f64::from(round.number), (line.value)(round))).collect();
        panel.line(svg, &format!("s-{}", line.colour), &values);
        for (number, value) in values.iter().filter(|_| values.len() < 40) {
            svg.dot(&format!("f-{}", line.colour), panel.at(*number, *value), 3.0);
        }
        let x = panel.right() + 8.0;
        svg.line("grid", &[(end.0 + 5.0, end.1), (x - 2.0, place - 4.0)]);
        svg.text(&format!("t-{}", line.colour), Anchor::Start, (x, place - 3.0), line.name);
        if let Some((_, value)) = values.last() {
            svg.text("soft small", Anchor::Start, (x, place + 10.0), &unit.text(*value));
        }
    }
}
