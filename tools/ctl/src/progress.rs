//! The progress of a migration: bars on a terminal, lines in a pipe, JSON for programs.

use std::collections::{BTreeMap, BTreeSet};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use memlane_api::types::{Migration, Phase};
use memlane_protocol::wire::plain;

use crate::show;
use crate::summary::{self, PortShare};
use crate::units;

/// The form in which progress is shown.
pub(crate) enum ProgressOutput {
    /// Bars on a terminal. They go to stderr, so that stdout has the result only.
    Bars(Bars),
    /// Lines in a pipe or a file. They go to stdout.
    Lines(Lines),
    /// Each event as a line of JSON on stdout.
    Events,
    /// No progress is shown.
    None,
}

/// The bars: one for the round and one for the share of each port.
pub(crate) struct Bars {
    all: MultiProgress,
    head: ProgressBar,
    round: ProgressBar,
    ports: BTreeMap<String, ProgressBar>,
}

/// The lines: one for each phase and round, at most one a second, one now and then in a long round, and one whenever a
/// port is lost or is back.
#[derive(Default)]
pub(crate) struct Lines {
    told: Option<(Phase, usize)>,
    at: Option<Instant>,
    lost: BTreeSet<String>,
}

const LINE_INTERVAL: Duration = Duration::from_secs(1);
const LONG_ROUND_INTERVAL: Duration = Duration::from_secs(10);

impl ProgressOutput {
    /// Chooses the form that fits where the output goes.
    pub(crate) fn of_output(json: bool) -> Self {
        let (out, err) = (std::io::stdout().is_terminal(), std::io::stderr().is_terminal());
        match (json, err && (out || json)) {
            (_, true) => Self::Bars(Bars::new()),
            (false, false) => Self::Lines(Lines::default()),
            (true, false) => Self::None,
        }
    }

    /// Shows the progress of a migration.
    pub(crate) fn update(&mut self, migration: &Migration) {
        match self {
            Self::Bars(bars) => bars.update(migration),
            Self::Lines(lines) => {
                let of_ports = lines.of_ports(migration);
                of_ports
                    .iter()
                    .chain(&lines.line(migration, Instant::now()))
                    .for_each(|line| show::line(line));
            }
            Self::Events => show::json(migration),
            Self::None => {}
        }
    }

    /// Prints a message without disturbing the bars.
    pub(crate) fn say(&self, text: &str) {
        match self {
            Self::Bars(bars) => bars.all.suspend(|| show::note(text)),
            _ => show::note(text),
        }
    }

    /// Removes the bars.
    pub(crate) fn finish(&mut self) {
        if let Self::Bars(bars) = self {
            // One by one: a bar that is dropped unfinished would draw itself once more.
            for bar in bars.ports.values().chain([&bars.round, &bars.head]) {
                bar.finish_and_clear();
            }
        }
    }
}

impl Bars {
    fn new() -> Self {
        let all = MultiProgress::new();
        let head = all.add(ProgressBar::new_spinner());
        head.set_style(style("{spinner} {wide_msg}"));
        head.enable_steady_tick(Duration::from_millis(120));
        let round = all.add(ProgressBar::new(0));
        round.set_style(style("  {prefix:<10} {bar:20} {wide_msg}"));
        Self { all, head, round, ports: BTreeMap::new() }
    }

    fn update(&mut self, migration: &Migration) {
        self.head.set_message(plain(&headline(migration)).into_owned());
        let of_round = migration.rounds.last().map_or(migration.pages_total, |round| round.pages);
        self.round.set_prefix(round_name(migration));
        self.round.set_length(of_round.max(migration.pages_remaining).max(1));
        self.round.set_position(of_round.saturating_sub(migration.pages_remaining));
        self.round.set_message(remaining(migration));

        let ports = summary::by_port(&migration.lanes);
        let sent: u64 = ports.values().map(|port| port.bytes).sum();
        for (name, port) in ports {
            let bar = self.ports.entry(name.to_owned()).or_insert_with(|| {
                let bar = self.all.add(ProgressBar::new(0));
                bar.set_style(style("  {prefix:<10} {bar:20} {wide_msg}"));
                bar.set_prefix(format!("port {name}"));
                bar
            });
            bar.set_length(sent.max(1));
            bar.set_position(port.bytes);
            bar.set_message(of_port(&port));
        }
    }
}

impl Lines {
    /// Returns lines about the ports that were lost or are back since the last call.
    fn of_ports(&mut self, migration: &Migration) -> Vec<String> {
        let Migration { guest, host, .. } = migration;
        let lost = summary::lost_ports(migration);
        let before = std::mem::replace(&mut self.lost, lost);
        let line = |port: &String, what: &str| format!("{guest} → {host}: port {port} {what}");
        let lost = self.lost.difference(&before);
        let lost = lost.map(|port| line(port, "is lost; the others carry its share, and it is tried again"));
        // Of a migration that has ended none is lost any more.
        let back = before.difference(&self.lost).filter(|_| migration.outcome.is_none());
        lost.chain(back.map(|port| line(port, "is back"))).collect()
    }

    /// Returns the line that is due, if one is.
    fn line(&mut self, migration: &Migration, now: Instant) -> Option<String> {
        let at = (migration.phase, migration.rounds.len());
        let since = self.at.map(|told| now.duration_since(told));
        let due = match since {
            None => true,
            Some(since) if self.told == Some(at) => since >= LONG_ROUND_INTERVAL,
            Some(since) => since >= LINE_INTERVAL,
        };
        if !due || migration.outcome.is_some() {
            return None;
        }
        (self.told, self.at) = (Some(at), Some(now));
        let mut line = headline(migration);
        if migration.phase == Phase::Copying {
            line.push_str(&format!(": {}: {}", round_name(migration), remaining(migration)));
        }
        Some(line)
    }
}

fn headline(migration: &Migration) -> String {
    let Migration { guest, host, phase, .. } = migration;
    let limit = units::seconds(migration.downtime_limit_seconds);
    if let (Phase::Fetching, Some(postcopy)) = (phase, &migration.postcopy) {
        let waits = postcopy.waits_for.as_ref().map_or(String::new(), |what| format!("; waits for {what}"));
        return format!("{guest} → {host}: {phase}, runs there without all of its memory{waits}");
    }
    if let Some(what) = &migration.waits_for {
        let doubt = if migration.in_doubt_since_unix_seconds.is_some() { ", in doubt" } else { "" };
        return format!("{guest} → {host}: {phase}{doubt}; waits for {what}");
    }
    match migration.downtime_predicted_seconds {
        Some(predicted) => {
            format!("{guest} → {host}: {phase}, predicted downtime {} of {limit}", units::seconds(predicted))
        }
        None => format!("{guest} → {host}: {phase}, downtime limit {limit}"),
    }
}

fn round_name(migration: &Migration) -> String {
    migration.rounds.last().map_or_else(String::new, |round| format!("round {}", round.round))
}

fn remaining(migration: &Migration) -> String {
    let pages = units::plural(migration.pages_remaining, "page");
    let verb = if migration.pages_remaining == 1 { "remains" } else { "remain" };
    let (rate, sent) =
        (units::rate(migration.bandwidth_bytes_per_second), units::bytes(migration.bytes_sent));
    format!("{pages} {verb}, {rate}, {sent} sent")
}

fn of_port(port: &PortShare) -> String {
    format!("{}, {}{}", units::rate(port.bytes_per_second), units::bytes(port.bytes), port.losses())
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .expect("the templates are constant and valid")
        .progress_chars("█▉░")
}

#[cfg(test)]
mod tests {
    use super::*;
    use memlane_api::types::{Lane, LaneState, Outcome, Round};

    #[test]
    fn a_line_for_each_change_and_not_more_than_one_a_second() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut lines = Lines::default();
        let mut migration = Migration::new("00ff", "web1", "host-b");
        migration.downtime_limit_seconds = 0.3;
        assert_eq!(lines.line(&migration, at(0)).unwrap(), "web1 → host-b: preflight, downtime limit 300 ms");
        migration.phase = Phase::Copying;
        assert_eq!(lines.line(&migration, at(100)), None);
        migration.rounds.push(Round { round: 1, pages: 10, ..Round::default() });
        migration.pages_remaining = 1;
        migration.downtime_predicted_seconds = Some(0.012);
        assert_eq!(
            lines.line(&migration, at(1000)).unwrap(),
            "web1 → host-b: copying, predicted downtime 12.0 ms of 300 ms: \
             round 1: 1 page remains, 0 bit/s, 0 B sent"
        );
        assert_eq!(lines.line(&migration, at(9000)), None);
        assert!(lines.line(&migration, at(11_000)).is_some());
        migration.outcome = Some(Outcome::Completed);
        assert_eq!(lines.line(&migration, at(60_000)), None);
    }

    #[test]
    fn a_line_whenever_a_port_is_lost_or_back() {
        let mut lines = Lines::default();
        let mut migration = Migration::new("00ff", "web1", "host-b");
        let lane = |state| Lane { port: "p0".to_owned(), state, ..Lane::default() };
        let mut told = |state, outcome| {
            (migration.lanes, migration.outcome) = (vec![lane(state)], outcome);
            lines.of_ports(&migration)
        };
        assert!(told(LaneState::Up, None).is_empty());
        let lost = "web1 → host-b: port p0 is lost; the others carry its share, and it is tried again";
        assert_eq!(told(LaneState::Lost, None), [lost]);
        assert!(told(LaneState::Lost, None).is_empty());
        assert_eq!(told(LaneState::Up, None), ["web1 → host-b: port p0 is back"]);
        assert_eq!(told(LaneState::Lost, None), [lost]);
        assert!(told(LaneState::Lost, Some(Outcome::Completed)).is_empty());
    }
}
