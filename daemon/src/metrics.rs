//! What the daemon counts and measures: all names, help texts and units in one place.
//!
//! Names begin with `memlane_` and units are base units, as Prometheus has it. Counters are
//! there from the start with 0, so that the first increase is seen.

mod part;
mod port;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memlane_protocol::wire::control::FetchReport;
use metrics::{Unit, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::api::types::Outcome;
use crate::guest::StunReport;

pub use part::Part;
pub use port::PortMeter;

/// Kinds of pages, by how they travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// With their contents.
    Data,
    /// As a descriptor: nothing but zeroes.
    Zero,
    /// As a descriptor: never touched, not even read.
    Hole,
}

/// Legs of the way of a page that an access waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// From the moment that the access was seen until the page was asked for.
    Ask,
    /// Until all of the answer was there.
    Transfer,
    /// Until the page was placed.
    Place,
}

impl Leg {
    fn name(self) -> &'static str {
        match self {
            Self::Ask => FAULT_ASK,
            Self::Transfer => FAULT_TRANSFER,
            Self::Place => FAULT_PLACE,
        }
    }
}

/// Begins to count. Without this, or where the program has another recorder of its own, all
/// functions here do nothing. More than once is the same as once.
pub fn install() {
    INSTALLED.get_or_init(|| {
        let recorder = recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("this program records metrics elsewhere; /metrics stays empty");
        }
        describe();
        handle
    });
}

/// All metrics in Prometheus' text format 0.0.4; nothing before [`install`].
pub fn render() -> String {
    INSTALLED.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// Keeps samples from piling up where nobody reads `/metrics`. Runs until dropped.
pub async fn upkeep() {
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        if let Some(handle) = INSTALLED.get() {
            crate::task::aside(|| handle.run_upkeep()).await;
        }
    }
}

/// Guests whose VMM is attached.
pub fn guests(number: usize) {
    gauge!(GUESTS).set(number as f64);
}

/// Migrations under way, in both directions.
pub fn migrations_active(number: usize) {
    gauge!(MIGRATIONS_ACTIVE).set(number as f64);
}

/// A migration ended, seen from its source.
pub fn migration_ended(outcome: Outcome) {
    counter!(MIGRATIONS, "outcome" => outcome.as_str()).increment(1);
}

/// The preflight refused an order. The reason is a word, one of few: the finding's `what`.
pub fn refused(reason: &'static str) {
    counter!(REFUSALS, "reason" => reason).increment(1);
}

/// Pages were handed to the lanes.
pub fn pages_sent(kind: PageKind, pages: u64) {
    counter!(PAGES_SENT, "kind" => kind.as_str()).increment(pages);
}

/// A round of pre-copy ended.
pub fn round(took: Duration, dirtied_pages: u64) {
    histogram!(ROUND).record(took);
    counter!(DIRTY_PAGES).increment(dirtied_pages);
}

/// Tracking of a guest's writes began.
pub fn tracking_started(took: Duration) {
    histogram!(TRACKING_START).record(took);
}

/// A guest stood still for so long, and was expected to for so long.
pub fn downtime(actual: Duration, predicted: Duration) {
    histogram!(DOWNTIME).record(actual);
    histogram!(DOWNTIME_PREDICTED).record(predicted);
    histogram!(DOWNTIME_ERROR).record(actual.abs_diff(predicted));
}

/// What one guest in post-copy adds to the pages that are still missing on this host: nothing yet.
pub fn missing_pages() -> Part {
    Part::of(gauge!(MISSING_PAGES))
}

/// How fetching went on since `before`.
pub fn fetched(before: &FetchReport, now: &FetchReport) {
    counter!(FAULTS).increment(now.faults.saturating_sub(before.faults));
    let fetched = now.pages_fetched.saturating_sub(before.pages_fetched);
    counter!(FETCHED_PAGES, "by" => "fault").increment(fetched);
    let streamed = now.pages_streamed.saturating_sub(before.pages_streamed);
    counter!(FETCHED_PAGES, "by" => "stream").increment(streamed);
}

/// An access to a missing page waited from the moment that it was seen until the page was placed.
pub fn fault(waited: Duration) {
    histogram!(FAULT).record(waited);
}

/// A leg of that.
pub fn fault_leg(leg: Leg, took: Duration) {
    histogram!(leg.name()).record(took);
}

/// A guest's writes are held up from now on, which took so long to begin.
pub fn stun_began(took: Duration) {
    histogram!(STUN_SWITCH).record(took);
}

/// How a stun went on since `before`.
pub fn stunned(before: &StunReport, now: &StunReport) {
    /// Counters are whole numbers, and one stun may take less than a second.
    static NANOSECONDS: AtomicU64 = AtomicU64::new(0);
    let passed = now.in_force.saturating_sub(before.in_force).as_nanos() as u64;
    let nanoseconds = NANOSECONDS.fetch_add(passed, Ordering::Relaxed) + passed;
    counter!(STUN_SECONDS).absolute(nanoseconds / 1_000_000_000);
    counter!(STUN_RELEASED).increment(now.released_pages.saturating_sub(before.released_pages));
}

/// The journal was written to disk.
pub fn journal_synced(took: Duration) {
    histogram!(JOURNAL_SYNC).record(took);
}

/// Announcements of arrived guests were sent.
pub fn announced(frames: u64) {
    counter!(ANNOUNCEMENTS).increment(frames);
}

impl PageKind {
    const ALL: [Self; 3] = [Self::Data, Self::Zero, Self::Hole];

    fn as_str(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Hole => "hole",
        }
    }
}

static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();

const GUESTS: &str = "memlane_guests";
const MIGRATIONS_ACTIVE: &str = "memlane_migrations_active";
const MIGRATIONS: &str = "memlane_migrations_total";
const REFUSALS: &str = "memlane_preflight_refusals_total";
const BYTES_SENT: &str = "memlane_bytes_sent_total";
const BYTES_RECEIVED: &str = "memlane_bytes_received_total";
const ZERO_COPY_BYTES: &str = "memlane_zero_copy_bytes_total";
const COPIED_BYTES: &str = "memlane_copied_bytes_total";
const UNCOMPRESSED_BYTES: &str = "memlane_uncompressed_bytes_total";
const COMPRESSED_BYTES: &str = "memlane_compressed_bytes_total";
const BANDWIDTH: &str = "memlane_bandwidth_bytes_per_second";
const LANES_LOST: &str = "memlane_lanes_lost_total";
const LANES_REOPENED: &str = "memlane_lanes_reopened_total";
const PAGES_SENT: &str = "memlane_pages_sent_total";
const DIRTY_PAGES: &str = "memlane_dirty_pages_total";
const ROUND: &str = "memlane_round_seconds";
const TRACKING_START: &str = "memlane_tracking_start_seconds";
const DOWNTIME: &str = "memlane_downtime_seconds";
const DOWNTIME_PREDICTED: &str = "memlane_downtime_predicted_seconds";
const DOWNTIME_ERROR: &str = "memlane_downtime_prediction_error_seconds";
const STUN_SWITCH: &str = "memlane_stun_switch_seconds";
const STUN_SECONDS: &str = "memlane_stun_seconds_total";
const STUN_RELEASED: &str = "memlane_stun_released_pages_total";
const MISSING_PAGES: &str = "memlane_postcopy_missing_pages";
const FAULTS: &str = "memlane_postcopy_faults_total";
const FETCHED_PAGES: &str = "memlane_postcopy_pages_total";
const FAULT: &str = "memlane_postcopy_fault_seconds";
const FAULT_ASK: &str = "memlane_postcopy_fault_ask_seconds";
const FAULT_TRANSFER: &str = "memlane_postcopy_fault_transfer_seconds";
const FAULT_PLACE: &str = "memlane_postcopy_fault_place_seconds";
const JOURNAL_SYNC: &str = "memlane_journal_sync_seconds";
const ANNOUNCEMENTS: &str = "memlane_announcements_total";

enum Kind {
    Counter,
    Gauge,
    /// With its buckets.
    Histogram(&'static [f64]),
}

/// Of a pause, of what happens within one, and of the start of tracking.
const SHORT: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0, 2.5, 10.0,
];
/// Of a round: up to a terabyte on a slow network.
const LONG: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0];
/// Of a page on its way over a network, in about equal ratios (the series E6 of IEC 60063): a quantile is told within a
/// fifth.
const WIRE: &[f64] = &[
    0.000_01, 0.000_015, 0.000_022, 0.000_033, 0.000_047, 0.000_068, 0.0001, 0.000_15, 0.000_22, 0.000_33,
    0.000_47, 0.000_68, 0.001, 0.0015, 0.0022, 0.0033, 0.0047, 0.0068, 0.01, 0.015, 0.022, 0.033, 0.047,
    0.068, 0.1, 0.22, 0.47, 1.0, 2.2, 4.7, 10.0,
];
/// Of a write to disk.
const DISK: &[f64] = &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];

const ALL: [(&str, Kind, Unit, &str); 32] = [
    (GUESTS, Kind::Gauge, Unit::Count, "Guests whose VMM is attached."),
    (MIGRATIONS_ACTIVE, Kind::Gauge, Unit::Count, "Migrations under way, in both directions."),
    (MIGRATIONS, Kind::Counter, Unit::Count, "Migrations that ended, counted at their source, by outcome."),
    (REFUSALS, Kind::Counter, Unit::Count, "Orders that the preflight refused, by reason."),
    (BYTES_SENT, Kind::Counter, Unit::Bytes, "Bytes that lanes sent, by port."),
    (BYTES_RECEIVED, Kind::Counter, Unit::Bytes, "Bytes that lanes received, by port."),
    (ZERO_COPY_BYTES, Kind::Counter, Unit::Bytes, "Bytes sent straight from guest memory, by port."),
    (COPIED_BYTES, Kind::Counter, Unit::Bytes, "Bytes that the kernel copied to send them, by port."),
    (UNCOMPRESSED_BYTES, Kind::Counter, Unit::Bytes, "Bytes of pages that lanes compressed, by port."),
    (COMPRESSED_BYTES, Kind::Counter, Unit::Bytes, "Bytes that these became, by port."),
    (BANDWIDTH, Kind::Gauge, Unit::Bytes, "What lanes deliver, measured lately, by port."),
    (LANES_LOST, Kind::Counter, Unit::Count, "Lanes that were lost while they sent, by port."),
    (LANES_REOPENED, Kind::Counter, Unit::Count, "Lanes that came in the place of lost ones, by port."),
    (PAGES_SENT, Kind::Counter, Unit::Count, "Pages sent, by kind: data, zero, hole."),
    (DIRTY_PAGES, Kind::Counter, Unit::Count, "Pages that guests wrote while a round was sent."),
    (ROUND, Kind::Histogram(LONG), Unit::Seconds, "Length of rounds of pre-copy."),
    (TRACKING_START, Kind::Histogram(SHORT), Unit::Seconds, "Time to begin to track a guest's writes."),
    (DOWNTIME, Kind::Histogram(SHORT), Unit::Seconds, "Downtime: how long guests stood still."),
    (DOWNTIME_PREDICTED, Kind::Histogram(SHORT), Unit::Seconds, "Downtime as predicted at switchover."),
    (DOWNTIME_ERROR, Kind::Histogram(SHORT), Unit::Seconds, "How far downtime and prediction lay apart."),
    (
        STUN_SWITCH,
        Kind::Histogram(SHORT),
        Unit::Seconds,
        "How long it took until a guest's writes were held to a rate.",
    ),
    (STUN_SECONDS, Kind::Counter, Unit::Seconds, "Time for which guests' writes were held to a rate."),
    (STUN_RELEASED, Kind::Counter, Unit::Count, "Pages that guests were let write in that time."),
    (MISSING_PAGES, Kind::Gauge, Unit::Count, "Pages that guests in post-copy still miss here."),
    (FAULTS, Kind::Counter, Unit::Count, "Accesses to missing pages that had to wait."),
    (
        FETCHED_PAGES,
        Kind::Counter,
        Unit::Count,
        "Missing pages that came, by: fault, or stream (nobody waited).",
    ),
    (FAULT, Kind::Histogram(WIRE), Unit::Seconds, "From an access to a missing page until it was placed."),
    (FAULT_ASK, Kind::Histogram(WIRE), Unit::Seconds, "Of that, until the page was asked for."),
    (FAULT_TRANSFER, Kind::Histogram(WIRE), Unit::Seconds, "Of that, until the answer was there."),
    (FAULT_PLACE, Kind::Histogram(WIRE), Unit::Seconds, "Of that, until the page was in place."),
    (JOURNAL_SYNC, Kind::Histogram(DISK), Unit::Seconds, "Time to write the journal to disk."),
    (ANNOUNCEMENTS, Kind::Counter, Unit::Count, "Announcements (RARP) sent for guests that arrived."),
];

fn recorder() -> PrometheusRecorder {
    let mut builder = PrometheusBuilder::new();
    for (name, kind, ..) in &ALL {
        if let Kind::Histogram(buckets) = kind {
            builder = builder
                .set_buckets_for_metric(Matcher::Full((*name).to_owned()), buckets)
                .expect("no list of buckets is empty");
        }
    }
    builder.build_recorder()
}

fn describe() {
    for (name, kind, unit, help) in ALL {
        match kind {
            Kind::Counter => metrics::describe_counter!(name, unit, help),
            Kind::Gauge => metrics::describe_gauge!(name, unit, help),
            Kind::Histogram(_) => {
                metrics::describe_histogram!(name, unit, help);
                // Registered by being looked up, and shown with a count of 0.
                let _ = histogram!(name);
            }
        }
    }
    guests(0);
    migrations_active(0);
    for outcome in [Outcome::Completed, Outcome::Failed, Outcome::Cancelled, Outcome::Refused, Outcome::Lost]
    {
        counter!(MIGRATIONS, "outcome" => outcome.as_str()).increment(0);
    }
    for kind in PageKind::ALL {
        pages_sent(kind, 0);
    }
    counter!(DIRTY_PAGES).increment(0);
    stunned(&StunReport::default(), &StunReport::default());
    fetched(&FetchReport::default(), &FetchReport::default());
    gauge!(MISSING_PAGES).increment(0.0);
    announced(0);
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

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
            PortMeter::new("a");
            refused("memory");
        });
        let (kinds, helps, samples) = parse(&text);
        let names: BTreeSet<&str> = ALL.iter().map(|(name, ..)| *name).collect();
        assert_eq!(names.len(), ALL.len());
        assert_eq!(names, kinds.keys().copied().collect());
        assert_eq!(names, helps.keys().copied().collect());
        for (name, kind, unit, help) in ALL {
            let expected = match kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram(_) => "histogram",
            };
            assert_eq!((kinds[name], helps[name]), (expected, help));
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
            let port = PortMeter::new("a");
            port.sent(1000);
            port.sent(1);
            port.received(5);
            port.zero_copy(600);
            port.copied(400);
            port.compressed(300, 100);
            let mut parts =
                [port.bandwidth(), PortMeter::new("a").bandwidth(), PortMeter::new("b").bandwidth()];
            parts[0].set(2_000_000_000);
            parts[1].set(250_000_000);
            parts[0].set(1_000_000_000);
            parts[2].set(7);
            let [first, second, _] = parts;
            std::mem::forget((first, second));
            guests(2);
            migrations_active(1);
            migration_ended(Outcome::Completed);
            refused("memory");
            pages_sent(PageKind::Zero, 7);
            round(Duration::from_secs(2), 30);
            tracking_started(Duration::from_millis(2));
            downtime(Duration::from_millis(12), Duration::from_millis(9));
            journal_synced(Duration::from_micros(300));
            announced(5);
            stun_began(Duration::from_millis(30));
            let report =
                StunReport { in_force: Duration::from_secs(2), released_pages: 9, target_pages: 9.0 };
            stunned(&StunReport::default(), &report);
            let [mut missing, mut also, mut ended] = [missing_pages(), missing_pages(), missing_pages()];
            missing.set(100);
            also.set(5);
            ended.set(1000);
            missing.set(4);
            drop(ended);
            std::mem::forget((missing, also));
            let report =
                FetchReport { faults: 3, pages_fetched: 3, pages_streamed: 8, ..FetchReport::default() };
            fetched(&FetchReport { pages_streamed: 1, ..FetchReport::default() }, &report);
            fault(Duration::from_micros(80));
            fault_leg(Leg::Transfer, Duration::from_micros(60));
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
            ("memlane_migrations_active", 1.0),
            ("memlane_migrations_total{outcome=\"completed\"}", 1.0),
            ("memlane_migrations_total{outcome=\"failed\"}", 0.0),
            ("memlane_preflight_refusals_total{reason=\"memory\"}", 1.0),
            ("memlane_pages_sent_total{kind=\"zero\"}", 7.0),
            ("memlane_dirty_pages_total", 30.0),
            ("memlane_round_seconds_sum", 2.0),
            ("memlane_tracking_start_seconds_count", 1.0),
            ("memlane_downtime_seconds_bucket{le=\"0.01\"}", 0.0),
            ("memlane_downtime_seconds_bucket{le=\"0.02\"}", 1.0),
            ("memlane_downtime_predicted_seconds_sum", 0.009),
            ("memlane_downtime_prediction_error_seconds_sum", 0.003),
            ("memlane_journal_sync_seconds_count", 1.0),
            ("memlane_announcements_total", 5.0),
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
}
