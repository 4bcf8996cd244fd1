//! The effect of a move on the guest: its progress from moment to moment.

use crate::picture::{Anchor, GUTTER, Panel, Picture, Scale, Svg, Unit, WIDTH, digits, width_of};
use crate::timeline::{Course, ProgressSample, TimeSpan, Timeline};

const TOP: f64 = 72.0;
const BOTTOM: f64 = 262.0;
const HEIGHT: f64 = 306.0;
/// The place where the panel of the whole move ends, and that of the pause begins.
const WHOLE: f64 = 620.0;
const CLOSE: f64 = 680.0;
/// The height of the bar that names the phases.
const BAR: f64 = 14.0;
/// The shortest spans over which the guest's progress is shown, in seconds: of the whole move, and of the pause.
const SHORTEST: (f64, f64) = (0.02, 0.004);

/// A line about the guest: about its vCPUs that write, or about those that only read.
struct VcpuLine {
    name: &'static str,
    colour: &'static str,
    /// The number of pages that the guest counts at a time.
    grain: f64,
    count: fn(&ProgressSample) -> u64,
    rates: fn(&Timeline, f64) -> Vec<(f64, f64)>,
}

const LINES: [VcpuLine; 2] = [
    VcpuLine {
        name: "writes",
        colour: "blue",
        grain: 1.0,
        count: |progress| progress.written,
        rates: Timeline::writing,
    },
    VcpuLine {
        name: "reads",
        colour: "green",
        grain: 1024.0,
        count: |progress| progress.read,
        rates: Timeline::reading,
    },
];

/// Draws the guest's progress through the move beside that before it; returns `None` if the guest did nothing.
pub(super) fn draw(timeline: &Timeline) -> Option<Picture> {
    let span = timeline.span()?;
    let before = TimeSpan { from: span.from, to: 0.0 };
    let lines: Vec<(&VcpuLine, f64)> = (LINES.iter())
        .filter_map(|line| Some((line, ProgressSample::mean(&timeline.progress, before, line.count)?)))
        .filter(|(_, mean)| *mean > 0.0)
        .collect();
    if lines.is_empty() {
        return None;
    }
    let course = &timeline.course;
    let shown = whole(span, course);
    let mut svg = Svg::default();
    let step = SHORTEST.0.max(shown.seconds() / 200.0);
    let whole = Panel {
        x: Scale::linear(
            (shown.from, shown.to),
            (GUTTER, if course.pause.is_some() { WHOLE } else { WIDTH - 60.0 }),
        ),
        y: Scale::linear((0.0, top(timeline, &lines, step)), (BOTTOM, TOP)),
    };
    head(&mut svg, &lines);
    phases(&mut svg, &whole, course);
    draw_lines(&mut svg, &whole, timeline, &lines, step);
    whole.columns(&mut svg, Unit::Seconds, 8);
    whole.below(&mut svg, "since the order");
    for note in &timeline.notes {
        whole.upright(&mut svg, "dash", note.seconds);
        svg.text("soft small", Anchor::Start, (whole.x.at(note.seconds) + 4.0, BOTTOM - 8.0), &note.text);
    }
    if let Some(pause) = course.pause {
        close_up(&mut svg, &whole, timeline, &lines, pause);
    }
    Some(Picture::new(svg, HEIGHT, tells(&lines, timeline)))
}

/// Writes what is shown, and what each line is, in its colour.
fn head(svg: &mut Svg, lines: &[(&VcpuLine, f64)]) {
    let texts = lines.iter().map(|(line, mean)| {
        (format!("strong t-{}", line.colour), format!("{} {}", line.name, Unit::PagesPerSecond.text(*mean)))
    });
    let texts: Vec<_> = texts.collect();
    let mut parts = vec![
        (0.0, "title", "What the guest gets done"),
        (14.0, "soft", "100 % is what it did before the order:"),
    ];
    for (index, (class, text)) in texts.iter().enumerate() {
        if index > 0 {
            parts.push((5.0, "soft", "and"));
        }
        parts.push((5.0, class, text));
    }
    svg.texts((0.0, 14.0), &parts);
}

/// Returns the time that is shown: from a little before the order until a little after the end.
pub(super) fn whole(span: TimeSpan, course: &Course) -> TimeSpan {
    let room = (course.ended * 0.06).max(0.05);
    TimeSpan { from: span.from.max(-room), to: span.to.min(course.ended + room) }
}

fn top(timeline: &Timeline, lines: &[(&VcpuLine, f64)], step: f64) -> f64 {
    let rates = lines.iter().flat_map(|(line, mean)| {
        let rates = (line.rates)(timeline, step).into_iter();
        rates.filter(|(at, _)| *at > 0.0).map(move |(_, rate)| rate / mean)
    });
    // What a guest makes up for after a pause may be very much, for a moment.
    rates.fold(1.0, f64::max).clamp(1.05, 1.5)
}

fn draw_lines(svg: &mut Svg, panel: &Panel, timeline: &Timeline, lines: &[(&VcpuLine, f64)], step: f64) {
    panel.rows(svg, Unit::Percent, 3);
    let (from, to) = panel.x.values();
    for (line, mean) in lines {
        // A few of its grains make a rate.
        let rates = (line.rates)(timeline, step.max(4.0 * line.grain / mean));
        // One more at either side, for the steps to begin and to end.
        let first = rates.partition_point(|(seconds, _)| *seconds <= from).saturating_sub(1);
        let last = (rates.partition_point(|(seconds, _)| *seconds < to) + 1).min(rates.len());
        let rates: Vec<_> =
            rates[first..last].iter().map(|(seconds, rate)| (*seconds, rate / mean)).collect();
        if line.colour == "blue" {
            panel.filled_steps(svg, "w-blue", &rates);
        }
        panel.steps(svg, &format!("s-{}", line.colour), &rates);
    }
    panel.level(svg, "dash", 1.0);
}

/// Draws a bar above the panel that names the daemons' phases.
fn phases(svg: &mut Svg, panel: &Panel, course: &Course) {
    let y = TOP - BAR - 6.0;
    let mut part = |class: &str, span: TimeSpan, names: &[String]| {
        let (from, to) = (panel.x.at(span.from), panel.x.at(span.to));
        let to = to.max(from + 2.0);
        svg.rectangle(class, (from, y), (to - from - 0.5, BAR));
        if let Some(name) = names.iter().find(|name| width_of(name) + 6.0 < to - from) {
            svg.text("small", Anchor::Middle, ((from + to) / 2.0, y + 10.5), name);
        }
    };
    let first = course.rounds.first().map(|round| round.span.from);
    let begins = first.or(course.pause.map(|pause| pause.from)).unwrap_or(course.ended);
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    part("hair", TimeSpan { from: 0.0, to: begins }, &words(&["preparing"]));
    for round in &course.rounds {
        let names = [format!("round {}", round.number), round.number.to_string()];
        part(if round.number % 2 == 1 { "w-blue" } else { "w-blue strong" }, round.span, &names);
    }
    if let Some(postcopy) = course.postcopy {
        part("w-purple", postcopy, &words(&["post-copy"]));
    }
    if let Some(pause) = course.pause {
        part("f-orange", pause, &[]);
    }
    if let Some(stun) = course.stun {
        let (from, to) = (panel.x.at(stun.from), panel.x.at(stun.to));
        svg.rectangle("f-amber", (from, y + BAR + 1.0), (to - from, 2.0));
        svg.text("small t-amber", Anchor::Start, (from + 2.0, y - 4.0), "writes held up");
    }
}

/// Draws the pause and a little time around it.
fn close_up(svg: &mut Svg, whole: &Panel, timeline: &Timeline, lines: &[(&VcpuLine, f64)], pause: TimeSpan) {
    whole.band(svg, "w-orange", (pause.from, pause.to));
    let room = (pause.seconds() * 1.5).max(0.02);
    let panel =
        Panel { x: Scale::linear((pause.from - room, pause.to + room), (CLOSE, WIDTH - 16.0)), y: whole.y };
    panel.band(svg, "w-orange", (pause.from, pause.to));
    draw_lines(svg, &panel, timeline, lines, SHORTEST.1);
    // Its own clock begins when the guest stops.
    let clock = Panel { x: Scale::linear((-room, pause.seconds() + room), panel.x.places()), y: panel.y };
    clock.columns(svg, Unit::Seconds, 4);
    clock.below(svg, "since the guest stopped");
    let mut bar = |class: &str, label: &str, y: f64, name: &str, seconds: f64| {
        let (from, to) = (clock.x.at(0.0), clock.x.at(seconds));
        svg.rectangle(class, (from, y), ((to - from).max(1.0), 6.0));
        svg.text(
            label,
            Anchor::End,
            (from - 6.0, y + 7.0),
            &format!("{name} {}", Unit::Seconds.text(seconds)),
        );
    };
    bar("f-orange", "strong t-orange", TOP - 26.0, "stood still for", pause.seconds());
    if let Some(predicted) = timeline.course.predicted_pause {
        bar("f-soft", "soft", TOP - 12.0, "predicted", predicted);
    }
}

fn tells(lines: &[(&VcpuLine, f64)], timeline: &Timeline) -> String {
    let course = &timeline.course;
    let copying = course.rounds.first().zip(course.rounds.last());
    let mut text = "The guest's progress over time".to_owned();
    if let Some((first, last)) = copying {
        let span = TimeSpan { from: first.span.from, to: last.span.to };
        for (line, before) in lines {
            if let Some(mean) = ProgressSample::mean(&timeline.progress, span, line.count) {
                text += &format!(
                    "; while it was copied, {} at {} % of before",
                    line.name,
                    digits(100.0 * mean / before)
                );
            }
        }
    }
    if let Some(pause) = course.pause {
        text += &format!("; it stood still for {}", Unit::Seconds.text(pause.seconds()));
    }
    text
}
