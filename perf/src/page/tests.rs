use serde_json::json;

use super::*;
use crate::report::{CaseRuns, NamedFigures, Trace, Waits};
use crate::timeline::{Course, Note, PortLine, ProgressSample, RoundSpan, TimeSpan};

/// Something between -0.5 and 0.5 that looks random.
fn noise(number: u64) -> f64 {
    let mixed = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (number << 13);
    let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed >> 40) as f64 / f64::from(1u32 << 24) - 0.5
}

/// A guest that is copied from 0.12 s to 3.9 s, stands still for 12.3 ms, and then has all of its memory or not.
fn timeline(postcopy: bool) -> Timeline {
    let pause = TimeSpan { from: 3.9, to: 3.9123 };
    let (mut written, mut read) = (0.0, 0.0);
    let mut progress = Vec::new();
    for (tick, seconds) in (0..3500).map(|tick| (tick, -1.0 + tick as f64 * 0.002)) {
        let stands = pause.from <= seconds && seconds < pause.to;
        let writes = match seconds {
            _ if stands => 0.0,
            0.12..3.9 => 0.9 + 0.05 * noise(tick / 20),
            3.9..5.0 if postcopy => 0.3 + 0.6 * (seconds - 3.9) / 1.1,
            _ => 1.0 + 0.04 * noise(tick),
        };
        written += writes * 10_000.0 * 0.002;
        read += if stands { 0.0 } else { (0.98 + 0.02 * noise(tick + 999)) * 3e5 * 0.002 };
        progress.push(ProgressSample { seconds, written: written as u64, read: read as u64 });
    }
    let port = |number: u64| {
        let mut bytes = 0.0;
        let carried = (0..350).map(|tick| {
            let seconds = -1.0 + tick as f64 * 0.02;
            let copying = (0.12..if postcopy { 5.0 } else { 3.91 }).contains(&seconds);
            let lost = number == 2 && (1.4..2.6).contains(&seconds);
            bytes +=
                if copying && !lost { 2.48e6 * (1.0 - 0.01 * noise(tick + number * 77).abs()) } else { 0.0 };
            (seconds, bytes as u64)
        });
        PortLine { name: format!("port{number}"), carried: carried.collect() }
    };
    let (mut from, mut seconds, mut to_send) = (0.12, 3.4, 1.7e9);
    let rounds = (1..=7).map(|number| {
        let span = TimeSpan { from, to: from + seconds };
        let dirtied = (10_000.0 * 4096.0 * seconds * 0.9_f64).min(2.6e8);
        let round = RoundSpan { number, span, sent: to_send * 1.004, dirtied };
        (from, seconds, to_send) = (span.to, (dirtied / 5e8_f64).min(3.9 - span.to).max(0.002), dirtied);
        round
    });
    let course = Course {
        ended: if postcopy { 5.0 } else { 3.95 },
        rounds: rounds.collect(),
        stun: None,
        pause: Some(pause),
        predicted_pause: Some(0.0151),
        postcopy: postcopy.then_some(TimeSpan { from: pause.to, to: 5.0 }),
    };
    let note = |seconds, text: &str| Note { seconds, text: text.to_owned() };
    let notes = vec![note(1.4, "port2 goes down"), note(2.6, "port2 is back")];
    Timeline { progress, ports: (0..4).map(port).collect(), course, notes, ..Timeline::default() }
}

fn waits(middle: f64) -> Waits {
    let time = |number| middle * (2.0 * (noise(number) + noise(number + 7777))).exp();
    let times: Vec<_> = (0..5000).map(|number| std::time::Duration::from_secs_f64(time(number))).collect();
    Waits::of(&times)
}

fn run(repetition: u32, case: Case, seconds: f64, trace: Trace) -> CaseRun {
    let predicted = 0.02 + 0.02 * noise(repetition.into());
    let error = 0.01 * noise(u64::from(repetition) * 7 + case.how.len() as u64);
    let detail = json!({ "downtime_predicted_seconds": predicted, "downtime_seconds": predicted + error });
    let figures = NamedFigures::from([("total_seconds", seconds), ("gbit_per_second", 16.0 / seconds)]);
    CaseRun { repetition, case, figures, detail, trace }
}

/// Three moves in each of three cases, and as many of bare sockets.
fn report(scenario: &'static str, postcopy: bool) -> ScenarioReport {
    let mut runs = CaseRuns::default();
    for repetition in 1..=3 {
        for case in ["30 %", "60 %", "90 % & <more>"] {
            let trace = Trace { timeline: Some(timeline(postcopy)), waits: postcopy.then(|| waits(95e-6)) };
            let seconds = 4.0 + f64::from(repetition % 3);
            runs.push(run(repetition, Contender::Memlane.case(case), seconds, trace));
        }
        let trace = Trace { timeline: None, waits: postcopy.then(|| waits(60e-6)) };
        runs.push(run(repetition, Contender::Raw.case(""), 3.9, trace));
    }
    let headline = "a guest of 2 GiB that writes, over 4 ports of <1 Gbit/s>".to_owned();
    let settings = json!({ "ports": 4, "ram_bytes": 2_147_483_648_u64, "guest": "kvm" });
    let mut report = ScenarioReport::new(scenario, headline, &settings, runs).expect("settings");
    for (name, values) in [
        ("prediction_error_p90_ms", vec![11.0, 12.0, 18.0]),
        ("vs_raw", vec![0.93, 0.95, 0.91]),
        ("cpu_vs_raw", vec![1.4, 1.5, 1.2]),
    ] {
        report.ratio(name, values, "as \"measured\"");
    }
    report
}

/// Every element of a page ends where it must. Tells their names.
fn elements(html: &str) -> Vec<&str> {
    let (mut open, mut names) = (Vec::new(), Vec::new());
    for tag in html.split('<').skip(1).map(|rest| rest.split('>').next().expect("there is a first")) {
        let name = tag.split([' ', '\n', '/']).find(|part| !part.is_empty()).unwrap_or_default();
        match tag {
            _ if tag.starts_with('!') => {}
            _ if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "{html}"),
            _ if tag.ends_with('/') || name == "meta" => names.push(name),
            _ => {
                open.push(name);
                names.push(name);
            }
        }
    }
    assert!(open.is_empty(), "{open:?}");
    names
}

#[test]
fn a_page_is_whole_and_needs_nothing_from_elsewhere() {
    let mut bulk = report("bulk", false);
    bulk.notes.push("a <note>".into());
    let html = page(&[bulk, report("busy", false), report("outrun", true)]);
    let names = elements(&html);
    assert!(!names.contains(&"script") && !names.contains(&"link") && !names.contains(&"img"));
    let own = html.replace("http://www.w3.org/2000/svg", "");
    for foreign in ["http:", "https:", "//", "url(", "@import", "src="] {
        assert!(!own.contains(foreign), "{foreign}");
    }
    // Ratios and predictions of all; then of each its ratios, and of three cases the guest, the ports and the rounds;
    // the predictions of two, and the faults of one.
    let targets = names.iter().filter(|name| **name == "svg").count();
    assert_eq!(targets, 2 + 2 + 3 * 9 + 3 + 1);
    for text in [
        "4 ports of &lt;1 Gbit/s&gt;",
        "a &lt;note&gt;",
        "memlane 90 % &amp; &lt;more&gt;, repetition 1",
        "at least 0.9",
    ] {
        assert!(html.contains(text), "{text}");
    }
    assert!(!html.contains("NaN") && !html.contains("inf"), "all numbers are numbers");
}

#[test]
fn a_move_that_took_as_long_as_most_is_shown() {
    let report = report("busy", false);
    let shown: Vec<String> = moves(&report).into_iter().map(|(name, _)| name).collect();
    // The third repetition took 4 s, the first 5 s, and the second 6 s.
    assert!(shown.len() == 3 && shown.iter().all(|name| name.ends_with("repetition 1")), "{shown:?}");
}

#[test]
fn a_migration_may_be_told_beside_other_things() {
    let mut runs = CaseRuns::default();
    for mut run in report("busy", false).runs.iter().cloned() {
        run.detail = json!({ "migration": run.detail, "readers": null });
        runs.push(run);
    }
    let report = ScenarioReport::new("outrun", String::new(), &json!({}), runs).expect("settings");
    assert_eq!(pauses(&report, |case| case.how.clone()).count(), 9);
}

#[test]
fn what_was_not_seen_is_not_drawn() {
    let nothing = Timeline::default();
    assert!(guest::draw(&nothing).is_none() && ports::draw(&nothing).is_none());
    assert!(rounds::draw(&nothing.course).is_none() && faults::draw(&[]).is_none());
    assert!(prediction::draw(&[], PREDICTION).is_none() && ratios::draw(&[]).is_none());
    let mut idle = timeline(false);
    idle.progress.iter_mut().for_each(|progress| (progress.written, progress.read) = (7, 0));
    assert!(guest::draw(&idle).is_none() && ports::draw(&idle).is_some());
    let empty =
        ScenarioReport::new("zero", String::new(), &json!({}), CaseRuns::default()).expect("settings");
    assert!(!elements(&page(std::slice::from_ref(&empty))).contains(&"svg"));
    assert_eq!(picture(&[empty]), None);
}

#[test]
fn moves_that_came_to_little_are_drawn() {
    // Neither a pause nor a second look; an order that was given up at once.
    let mut short = timeline(false);
    short.course = Course { ended: 0.0, ..Course::default() };
    short.progress.truncate(700);
    for picture in [guest::draw(&short), ports::draw(&short)] {
        elements(&picture.expect("something was seen").inline());
    }
    let pause = PredictedPause { case: "one".into(), predicted: 0.0, actual: 0.0 };
    elements(&prediction::draw(&[pause], PREDICTION).expect("a pause").inline());
    let mut report = report("bulk", false);
    report.ratio("vs_qemu", vec![0.0, f64::MAX], "as far off as can be");
    elements(&ratios::draw(&targets::of(&report)).expect("targets").inline());
}

#[test]
fn a_picture_stands_for_itself() {
    let picture = picture(&[report("busy", false)]).expect("a move");
    assert!(
        picture.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"")
            && picture.contains("prefers-color-scheme")
    );
    assert!(picture.len() < 40_000, "{} bytes", picture.len());
    assert_eq!(elements(&picture)[..3], ["svg", "title", "style"]);
}
