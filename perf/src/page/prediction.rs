//! Predicted downtime against the true one.

use crate::picture::{Anchor, GUTTER, Panel, Picture, Scale, Svg, Unit};

const TOP: f64 = 40.0;
const SIDE: f64 = 300.0;
const HEIGHT: f64 = TOP + SIDE + 46.0;
/// The place of the panel of errors.
const ERRORS: (f64, f64) = (560.0, 790.0);

/// The distance from one case to the next.
const ROW: f64 = 30.0;

/// The length of a pause, as it was predicted and as it was.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PredictedPause {
    /// The kind of the move, in a word or two.
    pub(super) case: String,
    /// The length that the last forecast predicted, in seconds.
    pub(super) predicted: f64,
    /// The length of the pause, in seconds.
    pub(super) actual: f64,
}

const COLOURS: [&str; 5] = ["blue", "orange", "green", "purple", "amber"];

/// Draws each pause, beside the diagonal and a band of `within` seconds around it; returns `None` without pauses.
pub(super) fn draw(pauses: &[PredictedPause], within: f64) -> Option<Picture> {
    let mut cases: Vec<&str> = pauses.iter().map(|pause| pause.case.as_str()).collect();
    cases.dedup();
    cases.sort_unstable();
    cases.dedup();
    let both = pauses.iter().flat_map(|pause| [pause.predicted, pause.actual]);
    let mut svg = Svg::default();
    let scale = |places| Scale::from_zero(both.clone(), places);
    let panel = Panel { x: scale((GUTTER, GUTTER + SIDE)), y: scale((TOP + SIDE, TOP)) };
    if pauses.is_empty() {
        return None;
    }
    let largest = panel.x.values().1;
    panel.title(&mut svg, "Downtime", "as it was, over what was predicted");
    panel.rows(&mut svg, Unit::Seconds, 5);
    let band = [(0.0, within), (largest - within, largest), (largest, largest), (largest, largest - within)];
    let corners: Vec<(f64, f64)> = match within < largest {
        true => [&[(0.0, 0.0)], &band[..], &[(within, 0.0)]].concat(),
        false => vec![(0.0, 0.0), (0.0, largest), (largest, largest), (largest, 0.0)],
    };
    let points: Vec<_> = corners.iter().map(|(x, y)| panel.at(*x, *y)).collect();
    svg.surface("w-soft", &points);
    svg.line("s-soft thin", &[panel.at(0.0, 0.0), panel.at(largest, largest)]);
    panel.columns(&mut svg, Unit::Seconds, 5);
    panel.below(&mut svg, "predicted");
    for pause in pauses {
        svg.dot(&dot(colour(&cases, &pause.case)), panel.at(pause.predicted, pause.actual), 4.0);
    }
    errors(&mut svg, pauses, &cases, within);
    Some(Picture::new(svg, HEIGHT, tells(pauses, within)))
}

/// Draws by how much each prediction was wrong, with a row for each case.
fn errors(svg: &mut Svg, pauses: &[PredictedPause], cases: &[&str], within: f64) {
    let furthest =
        pauses.iter().map(|pause| (pause.actual - pause.predicted).abs()).fold(within * 1.25, f64::max);
    let bottom = TOP + 14.0 + ROW * cases.len() as f64;
    let panel = Panel {
        x: Scale::linear((-furthest * 1.05, furthest * 1.05), ERRORS),
        y: Scale::linear((0.0, 1.0), (bottom, TOP)),
    };
    panel.title(svg, "Error", "how much longer it was than predicted");
    panel.band(svg, "w-soft", (-within, within));
    panel.upright(svg, "axis", 0.0);
    panel.columns(svg, Unit::Seconds, 5);
    for (row, case) in cases.iter().enumerate() {
        let y = TOP + 14.0 + ROW * row as f64 + 4.0;
        let mut errors: Vec<f64> = (pauses.iter())
            .filter(|pause| pause.case == *case)
            .map(|pause| pause.actual - pause.predicted)
            .collect();
        for error in &errors {
            svg.dot(&dot(colour(cases, case)), (panel.x.at(*error), y), 4.0);
        }
        errors.sort_by(|one, other| one.abs().total_cmp(&other.abs()));
        let nine = errors[(errors.len() * 9).div_ceil(10) - 1].abs();
        let class = format!("strong t-{}", colour(cases, case));
        svg.text(&class, Anchor::End, (panel.left() - 10.0, y + 4.0), case);
        let text = format!("9 of 10 within {}", Unit::Seconds.text(nine));
        svg.text("", Anchor::Start, (panel.right() + 12.0, y + 4.0), &text);
    }
}

fn colour(cases: &[&str], case: &str) -> &'static str {
    let index = cases.iter().position(|known| *known == case).unwrap_or(0);
    COLOURS[index % COLOURS.len()]
}

fn dot(colour: &str) -> String {
    format!("f-{colour} ring")
}

fn tells(pauses: &[PredictedPause], within: f64) -> String {
    let good = pauses.iter().filter(|pause| (pause.actual - pause.predicted).abs() <= within).count();
    format!(
        "Downtime predicted and true of {} moves; {good} are within {} of each other",
        pauses.len(),
        Unit::Seconds.text(within)
    )
}
