//! What is recorded is rendered, under names that are described.

use std::collections::{BTreeMap, BTreeSet};

use memlane_migrate::Progress;
use memlane_migrate::progress::{Lane, Phase, Postcopy, Role};
use memlane_protocol::wire::Label;
use metrics::Unit;

use super::*;
use crate::surroundings::Surroundings;

/// A migration that sends over port a, with lanes of these rates.
fn source(rates: &[f64]) -> Progress {
    let lane = |rate: &f64| Lane { port: "a".into(), bytes_per_second: *rate, ..Lane::default() };
    let lanes = rates.iter().map(lane).collect();
    let mut progress = Progress { lanes, ..Progress::new("1", "web1", "host-b") };
    (progress.status.phase, progress.ram.pages_remaining) = (Phase::Copying, 20);
    (progress.started_at_unix_seconds, progress.status.in_doubt_since_unix_seconds) = (1.7e9, None);
    progress
}

/// One that has ended.
fn ended() -> Progress {
    let mut progress = Progress { postcopy: destination(1000).postcopy, ..source(&[7.0]) };
    progress.status.outcome = Some(Outcome::Lost);
    progress
}

/// One whose guest misses so many pages here.
fn destination(remaining_pages: u64) -> Progress {
    let postcopy = Some(Postcopy { remaining_pages, ..Postcopy::default() });
    let mut progress = Progress { role: Role::Destination, postcopy, ..source(&[]) };
    (progress.status.phase, progress.started_at_unix_seconds) = (Phase::Fetching, 1.6e9);
    progress
}

/// One of which nobody knows whose the guest is.
fn in_doubt() -> Progress {
    let mut progress = destination(0);
    progress.status.phase = Phase::Committing;
    progress.status.in_doubt_since_unix_seconds = Some(1.65e9);
    progress
}

/// A host with a port that is up, and room.
fn seen() -> Surroundings {
    let ports = vec![("a".parse().unwrap(), true), ("b".parse().unwrap(), false)];
    Surroundings { ports, available_memory: Some(1 << 30), journal_room: Some((40, 100)) }
}

/// Runs on a recorder of this thread's own and gives what it renders.
fn rendered(record: impl FnOnce()) -> String {
    let recorder = recorder();
    metrics::with_local_recorder(&recorder, || {
        describe();
        record();
    });
    recorder.handle().render()
}

type ByName<'t, T> = BTreeMap<&'t str, T>;

/// Prometheus' text format, as far as it is used: kinds and helps by name, values by series.
fn parse(text: &str) -> (ByName<'_, &str>, ByName<'_, &str>, ByName<'_, f64>) {
    let (mut kinds, mut helps, mut samples) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let is_name = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || matches!(c, '_' | '0'..='9'))
    };
    for line in text.lines().filter(|line| !line.is_empty()) {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        if let ["#", what, name, rest] = words[..] {
            assert!(is_name(name), "{line}");
            let seen = if what == "TYPE" { kinds.insert(name, rest) } else { helps.insert(name, rest) };
            assert_eq!(seen, None, "{line}");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        assert!(is_name(name), "{line}");
        if let Some(labels) = series.strip_prefix(name).filter(|labels| !labels.is_empty()) {
            let labels = labels.strip_prefix('{').unwrap().strip_suffix('}').unwrap();
            for label in labels.split(',') {
                let (name, value) = label.split_once('=').unwrap();
                assert!(is_name(name) && value.starts_with('"') && value.ends_with('"'), "{line}");
            }
        }
        assert_eq!(samples.insert(series, value.parse().unwrap()), None, "{line}");
    }
    (kinds, helps, samples)
}

#[test]
fn all_names_are_described_and_rendered() {
    let text = rendered(|| {
        port("a");
        encryption(Some(1.8e9));
        peer("host-b", true);
        surroundings(&seen());
    });
    let (kinds, helps, samples) = parse(&text);
    let names: BTreeSet<&str> = ALL.iter().map(|(name, ..)| *name).collect();
    assert_eq!(names.len(), ALL.len());
    assert_eq!(names, kinds.keys().copied().collect());
    assert_eq!(names, helps.keys().copied().collect());
    for (name, kind, unit, help) in ALL {
        assert_eq!((kinds[name], helps[name]), (kind.name(), help));
        assert_eq!(matches!(kind, Kind::Counter), name.ends_with("_total"), "{name}");
        assert!(name.starts_with("memlane_"), "{name}");
        let unit_named = match unit {
            Unit::Seconds => name.trim_end_matches("_total").ends_with("_seconds"),
            Unit::Bytes => name.contains("_bytes"),
            _ => true,
        };
        assert!(unit_named, "{name}");
        assert!(samples.keys().any(|series| series.starts_with(name)), "{name} has no sample");
    }
}

#[test]
fn what_is_recorded_is_rendered() {
    let text = rendered(|| {
        let name: Label = "a".parse().unwrap();
        port("a");
        let mut carried =
            Totals { wire_bytes: 1001, zero_copy_bytes: 600, copied_bytes: 400, ..Totals::default() };
        (carried.uncompressed_bytes, carried.compressed_bytes, carried.zero_pages) = (300, 100, 7);
        let measured = |measurement| Metrics.measured(measurement);
        measured(Measurement::Carried { port: &name, sending: true, fresh: carried });
        measured(Measurement::Carried {
            port: &name,
            sending: false,
            fresh: Totals { wire_bytes: 5, ..Totals::default() },
        });
        let migrations =
            [source(&[1e9, 2.5e8]), source(&[]), ended(), destination(4), destination(5), in_doubt()];
        now(&[1 << 20, 2 << 20], &migrations, ["a", "b"]);
        surroundings(&seen());
        peer("host-b", true);
        peer("host-c", false);
        measured(Measurement::Ended(Outcome::Completed));
        measured(Measurement::Refused("memory"));
        measured(Measurement::Iteration { took: Duration::from_secs(2), dirtied_pages: 30 });
        measured(Measurement::TrackingStarted(Duration::from_millis(2)));
        let (actual, predicted) = (Duration::from_millis(12), Duration::from_millis(9));
        for limit in [Duration::from_millis(11), actual] {
            measured(Measurement::Downtime { actual, predicted, limit });
        }
        measured(Measurement::NotConverging("stun"));
        journal_synced(Duration::from_micros(300));
        (0..5).for_each(|_| Metrics.announced()());
        measured(Measurement::BlockIoStalled(Duration::from_millis(4)));
        measured(Measurement::StunBegan(Duration::from_millis(30)));
        let report = StunReport { in_force: Duration::from_secs(2), released_pages: 9, target_pages: 9.0 };
        Metrics.measured(Measurement::Stunned { before: &StunReport::default(), now: &report });
        let before = FetchReport { pages_streamed: 1, ..FetchReport::default() };
        let report = FetchReport { faults: 3, pages_fetched: 3, pages_streamed: 8, ..FetchReport::default() };
        Metrics.measured(Measurement::Fetched { before: &before, now: &report });
        Metrics.waited(Duration::from_micros(80));
        Metrics.took(FaultStage::Transfer, Duration::from_micros(60));
    });
    let (_, _, samples) = parse(&text);
    for (series, value) in [
        ("memlane_bytes_sent_total{port=\"a\"}", 1001.0),
        ("memlane_bytes_received_total{port=\"a\"}", 5.0),
        ("memlane_zero_copy_bytes_total{port=\"a\"}", 600.0),
        ("memlane_copied_bytes_total{port=\"a\"}", 400.0),
        ("memlane_uncompressed_bytes_total{port=\"a\"}", 300.0),
        ("memlane_compressed_bytes_total{port=\"a\"}", 100.0),
        // Of two migrations at once, and of one that has ended.
        ("memlane_bandwidth_bytes_per_second{port=\"a\"}", 1.25e9),
        ("memlane_bandwidth_bytes_per_second{port=\"b\"}", 0.0),
        ("memlane_guests", 2.0),
        ("memlane_guest_ram_bytes", f64::from(3 << 20)),
        ("memlane_available_memory_bytes", f64::from(1 << 30)),
        ("memlane_migrations_active{role=\"source\",phase=\"copying\"}", 2.0),
        ("memlane_migrations_active{role=\"source\",phase=\"fetching\"}", 0.0),
        ("memlane_migrations_active{role=\"destination\",phase=\"fetching\"}", 2.0),
        ("memlane_migrations_in_doubt", 1.0),
        ("memlane_oldest_migration_start_timestamp_seconds", 1.6e9),
        ("memlane_precopy_remaining_pages", 40.0),
        ("memlane_port_up{port=\"a\"}", 1.0),
        ("memlane_port_up{port=\"b\"}", 0.0),
        ("memlane_peer_reachable{peer=\"host-b\"}", 1.0),
        ("memlane_peer_reachable{peer=\"host-c\"}", 0.0),
        ("memlane_journal_filesystem_free_bytes", 40.0),
        ("memlane_journal_filesystem_size_bytes", 100.0),
        ("memlane_not_converging_total{remedy=\"stun\"}", 1.0),
        ("memlane_not_converging_total{remedy=\"give_up\"}", 0.0),
        ("memlane_downtime_limit_exceeded_total", 1.0),
        ("memlane_migrations_total{outcome=\"completed\"}", 1.0),
        ("memlane_migrations_total{outcome=\"failed\"}", 0.0),
        ("memlane_preflight_refusals_total{reason=\"memory\"}", 1.0),
        ("memlane_preflight_refusals_total{reason=\"preflight\"}", 0.0),
        ("memlane_pages_sent_total{kind=\"zero\"}", 7.0),
        ("memlane_dirty_pages_total", 30.0),
        ("memlane_round_seconds_sum", 2.0),
        ("memlane_tracking_start_seconds_count", 1.0),
        ("memlane_downtime_seconds_bucket{le=\"0.01\"}", 0.0),
        ("memlane_downtime_seconds_bucket{le=\"0.02\"}", 2.0),
        ("memlane_downtime_predicted_seconds_sum", 0.018),
        ("memlane_downtime_prediction_error_seconds_sum", 0.006),
        ("memlane_journal_sync_seconds_count", 1.0),
        ("memlane_announcements_total", 5.0),
        ("memlane_block_io_stall_seconds_sum", 0.004),
        ("memlane_stun_switch_seconds_sum", 0.03),
        ("memlane_stun_seconds_total", 2.0),
        ("memlane_stun_released_pages_total", 9.0),
        ("memlane_postcopy_missing_pages", 9.0),
        ("memlane_postcopy_faults_total", 3.0),
        ("memlane_postcopy_pages_total{by=\"stream\"}", 7.0),
        ("memlane_postcopy_fault_seconds_bucket{le=\"0.0001\"}", 1.0),
        ("memlane_postcopy_fault_transfer_seconds_count", 1.0),
    ] {
        assert_eq!(samples.get(series), Some(&value), "{series}\n{text}");
    }
}

#[test]
fn a_program_without_install_renders_nothing() {
    assert_eq!(INSTALLED.get().is_none(), render().is_empty());
}
