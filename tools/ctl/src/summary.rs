//! The summary of a migration that has ended.

use std::collections::{BTreeMap, BTreeSet};

use memlane_api::types::{Lane, LaneState, Migration, Outcome, Postcopy, Role};

use crate::units;

/// The number of characters in the bar that shows a port's share.
const BAR: usize = 20;

/// The traffic of the lanes of one port.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PortShare {
    pub bytes: u64,
    pub bytes_per_second: f64,
    pub zero_copy_bytes: u64,
    pub lanes: usize,
    /// The number of lanes that are lost now.
    pub lost: usize,
    /// The number of times that lanes of this port were lost.
    pub losses: u64,
}

impl PortShare {
    /// Describes the losses of the port, as words that follow others; empty if there were none.
    pub(crate) fn losses(&self) -> String {
        let lanes = units::plural(self.lanes as u64, "lane");
        match (self.lost, self.losses) {
            (0, 0) => String::new(),
            (0, 1) => ", was lost and is back".to_owned(),
            (0, times) => format!(", was lost {times} times and is back"),
            (lost, _) => format!(", {lost} of {lanes} lost"),
        }
    }
}

/// Adds up the lanes of each port.
pub(crate) fn by_port(lanes: &[Lane]) -> BTreeMap<&str, PortShare> {
    let mut ports = BTreeMap::<&str, PortShare>::new();
    for lane in lanes {
        let port = ports.entry(&lane.port).or_default();
        port.bytes += lane.bytes;
        port.bytes_per_second += lane.bytes_per_second;
        port.zero_copy_bytes += lane.zero_copy_bytes;
        port.lanes += 1;
        port.lost += usize::from(lane.state == LaneState::Lost);
        port.losses += u64::from(lane.losses);
    }
    ports
}

/// Returns the ports that have no lane left, of a migration that is under way.
pub(crate) fn lost_ports(migration: &Migration) -> BTreeSet<String> {
    let ports = by_port(&migration.lanes).into_iter();
    let lost = ports.filter(|(_, port)| port.lost == port.lanes && migration.outcome.is_none());
    lost.map(|(name, _)| name.to_owned()).collect()
}

/// Describes in a few lines how a migration ended.
pub(crate) fn of(migration: &Migration) -> String {
    let mut lines = vec![headline(migration)];
    let mut row = |name: &str, value: String| lines.push(format!("  {name:<9} {value}"));
    if let Some(reason) = &migration.reason {
        row("why", reason.clone());
    }
    row("total", units::seconds(migration.total_seconds));
    if let Some(downtime) = downtime(migration) {
        row("downtime", downtime);
    }
    if let Some(stall) = migration.longest_io_stall_seconds {
        row("disk I/O", format!("stood still for {} at most", units::seconds(stall)));
    }
    if let Some(postcopy) = &migration.postcopy {
        row("post-copy", fetched(postcopy));
    }
    if migration.bytes_sent > 0 {
        let verb = if migration.role == Role::Source { "sent" } else { "received" };
        row(verb, sent(migration));
        if migration.compressed_bytes > 0 {
            let (from, to) = (migration.uncompressed_bytes, migration.compressed_bytes);
            row("LZ4", format!("{} of these were {}", units::bytes(to), units::bytes(from)));
        }
        if migration.total_seconds > 0.0 {
            row("rate", units::rate(migration.bytes_sent as f64 / migration.total_seconds));
        }
    }
    let ports = by_port(&migration.lanes);
    let all: u64 = ports.values().map(|port| port.bytes).sum();
    for (name, port) in ports.iter().filter(|_| all > 0) {
        row(&format!("port {name}"), share(port, all, migration.total_seconds));
    }
    match migration.digest_verified {
        Some(true) => row("verified", "all RAM was equal at both ends before the handover".to_owned()),
        Some(false) => row("verified", "RAM DIFFERED between the hosts; the move was given up".to_owned()),
        None => {}
    }
    lines.join("\n")
}

fn headline(migration: &Migration) -> String {
    let Migration { guest, host, guest_runs_at, .. } = migration;
    let runs = match guest_runs_at {
        Some(at) => match &migration.guest_stays {
            Some(state) => format!("it is at {at}, and {state} as it was before"),
            None => format!("it runs on at {at}"),
        },
        None => "this host does not know where it runs; ask both hosts before you do anything".to_owned(),
    };
    match migration.outcome {
        Some(Outcome::Completed) => {
            let at = guest_runs_at.as_ref().unwrap_or(host);
            match &migration.guest_stays {
                Some(state) => {
                    format!("{guest} is at {at}, and does not run: it is {state}, as it was before.")
                }
                None => format!("{guest} runs at {at}."),
            }
        }
        Some(Outcome::Cancelled) => format!("{guest} was not moved, the order was cancelled: {runs}."),
        Some(Outcome::Failed) => format!("{guest} was not moved: {runs}."),
        Some(Outcome::Lost) => {
            let on = guest_runs_at.as_ref().map_or(String::new(), |at| {
                format!(" It runs on at {at}, where every access to the missing part fails.")
            });
            format!(
                "{guest} IS LOST: part of its memory never came to {host}, and the source's copy is out of date.{on}"
            )
        }
        Some(Outcome::PoweredOff) => {
            format!("{guest} has powered itself off, and runs nowhere; nothing is lost.")
        }
        Some(Outcome::Refused) => format!("{guest} was not moved, the order was refused: {runs}."),
        None => format!("{guest} is on its way to {host}."),
    }
}

fn downtime(migration: &Migration) -> Option<String> {
    let downtime = migration.downtime_seconds?;
    let limit = units::seconds(migration.downtime_limit_seconds);
    let predicted = match migration.downtime_predicted_seconds {
        Some(predicted) => format!("predicted {}, ", units::seconds(predicted)),
        None => String::new(),
    };
    let over = if downtime > migration.downtime_limit_seconds { " EXCEEDED" } else { "" };
    Some(format!("{} ({predicted}limit {limit}{over})", units::seconds(downtime)))
}

fn fetched(postcopy: &Postcopy) -> String {
    let seconds = |microseconds: f64| units::seconds(microseconds / 1e6);
    let mut text = format!(
        "{} without all of its memory: {} streamed, {} fetched",
        units::seconds(postcopy.seconds),
        units::plural(postcopy.pages_streamed, "page"),
        postcopy.pages_fetched
    );
    if postcopy.faults > 0 {
        let Postcopy { fault_p50_us, fault_p99_us, fault_max_us, .. } = *postcopy;
        text.push_str(&format!(
            "; {} (median {}, 99 % {}, longest {})",
            units::plural(postcopy.faults, "fault"),
            seconds(fault_p50_us),
            seconds(fault_p99_us),
            seconds(fault_max_us)
        ));
    }
    text
}

fn sent(migration: &Migration) -> String {
    let (bytes, rounds) = (units::bytes(migration.bytes_sent), migration.rounds.len() as u64);
    let mut text = format!(
        "{bytes} in {}: {}",
        units::plural(rounds, "round"),
        units::plural(migration.pages_sent, "page")
    );
    for (number, what) in [(migration.zero_pages, "zero page"), (migration.hole_pages, "hole")] {
        if number > 0 {
            text.push_str(&format!(", {}", units::plural(number, what)));
        }
    }
    text
}

fn share(port: &PortShare, all: u64, seconds: f64) -> String {
    let part = port.bytes as f64 / all as f64;
    let full = (part * BAR as f64).round() as usize;
    let bar = format!("{}{}", "█".repeat(full), "░".repeat(BAR - full.min(BAR)));
    let mut text = format!("{bar} {:>3.0} %  {:>9}", part * 100.0, units::bytes(port.bytes));
    if seconds > 0.0 {
        text.push_str(&format!("  {:>11}", units::rate(port.bytes as f64 / seconds)));
    }
    if port.zero_copy_bytes > 0 && port.bytes > 0 {
        text.push_str(&format!(
            ", {:.0} % zero-copy",
            100.0 * port.zero_copy_bytes as f64 / port.bytes as f64
        ));
    }
    text + &port.losses()
}

#[cfg(test)]
mod tests {
    use super::*;
    use memlane_api::types::Round;

    fn lane(port: &str, bytes: u64, state: LaneState) -> Lane {
        let losses = u32::from(state == LaneState::Lost);
        Lane { port: port.to_owned(), bytes, state, losses, ..Lane::default() }
    }

    #[test]
    fn ports_are_lost_and_come_back() {
        let mut migration = Migration::new("00ff", "web1", "host-b");
        migration.lanes =
            vec![lane("a", 1, LaneState::Lost), lane("b", 1, LaneState::Up), lane("b", 1, LaneState::Lost)];
        let losses = |migration: &Migration, port| by_port(&migration.lanes)[port].losses();
        assert_eq!(lost_ports(&migration), BTreeSet::from(["a".to_owned()]));
        assert_eq!(losses(&migration, "b"), ", 1 of 2 lanes lost");
        migration.lanes[0].state = LaneState::Up;
        migration.lanes[2] = Lane { losses: 3, ..lane("b", 1, LaneState::Up) };
        assert!(lost_ports(&migration).is_empty());
        assert_eq!(losses(&migration, "a"), ", was lost and is back");
        assert_eq!(losses(&migration, "b"), ", was lost 3 times and is back");
        migration.lanes[0] = lane("a", 1, LaneState::Closed);
        assert_eq!(losses(&migration, "a"), "");
    }

    #[test]
    fn a_completed_migration_is_summed_up() {
        let mut migration = Migration::new("00ff", "web1", "host-b");
        migration.outcome = Some(Outcome::Completed);
        migration.guest_runs_at = Some("host-b".to_owned());
        migration.total_seconds = 4.0;
        migration.downtime_limit_seconds = 0.3;
        migration.downtime_seconds = Some(0.0083);
        migration.downtime_predicted_seconds = Some(0.0091);
        migration.bytes_sent = 4 << 30;
        migration.pages_sent = 1 << 20;
        migration.uncompressed_bytes = 9 << 30;
        migration.compressed_bytes = 3 << 30;
        migration.zero_pages = 1;
        migration.rounds = vec![Round::default(); 3];
        migration.digest_verified = Some(true);
        migration.lanes = vec![
            lane("a", 2 << 30, LaneState::Closed),
            lane("a", 1 << 30, LaneState::Lost),
            lane("b", 1 << 30, LaneState::Closed),
        ];
        assert_eq!(
            of(&migration),
            "web1 runs at host-b.\n  \
             total     4.00 s\n  \
             downtime  8.30 ms (predicted 9.10 ms, limit 300 ms)\n  \
             sent      4.00 GiB in 3 rounds: 1,048,576 pages, 1 zero page\n  \
             LZ4       3.00 GiB of these were 9.00 GiB\n  \
             rate      8.59 Gbit/s\n  \
             port a    ███████████████░░░░░  75 %   3.00 GiB  6.44 Gbit/s, 1 of 2 lanes lost\n  \
             port b    █████░░░░░░░░░░░░░░░  25 %   1.00 GiB  2.15 Gbit/s\n  \
             verified  all RAM was equal at both ends before the handover"
        );
    }

    #[test]
    fn a_failure_says_first_where_the_guest_runs() {
        let mut migration = Migration::new("00ff", "web1", "host-b");
        migration.outcome = Some(Outcome::Failed);
        migration.guest_runs_at = Some("host-a".to_owned());
        migration.reason = Some("host-b went away".to_owned());
        let text = of(&migration);
        assert!(
            text.starts_with("web1 was not moved: it runs on at host-a.\n  why       host-b went away"),
            "{text}"
        );
        migration.guest_runs_at = None;
        assert!(of(&migration).contains("ask both hosts"), "{}", of(&migration));
    }
}
