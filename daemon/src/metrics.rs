//! The metrics of the daemon, for Prometheus.
//!
//! Names begin with `memlane_` and units are base units, as Prometheus has it (`names`). Counters exist from the
//! start with 0, so that Prometheus sees the first increase. The engine reports its measurements to [`Metrics`]. Gauges
//! are set when `/metrics` is read.

mod gauges;
mod names;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memlane_guest::StunReport;
use memlane_lane::Totals;
use memlane_lane::postcopy::{FaultObserver, FaultStage};
use memlane_migrate::progress::Outcome;
use memlane_migrate::{Measurement, Observer};
use memlane_protocol::wire::control::{FetchReport, RefusalKind};
use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::views;

use names::*;

pub(crate) use gauges::{encryption, now, peer, surroundings};

/// The reason of an order that the source has refused.
const BY_SOURCE: &str = "preflight";

static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the recorder of metrics. Without it, or if the program has another recorder, all functions here do nothing.
/// Further calls have no effect.
pub fn install() {
    INSTALLED.get_or_init(|| {
        let recorder = recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("this program has another recorder of metrics, so /metrics stays empty");
        }
        describe();
        handle
    });
}

/// Returns all metrics in Prometheus' text format 0.0.4. The text is empty before [`install`].
pub fn render() -> String {
    INSTALLED.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// Returns the names of all metrics and their kinds as Prometheus calls them: `counter`, `gauge` or `histogram`.
pub fn kinds() -> impl Iterator<Item = (&'static str, &'static str)> {
    ALL.iter().map(|(name, kind, ..)| (*name, kind.name()))
}

/// Discards old samples now and then, in case no program reads `/metrics`, until it is dropped.
pub async fn upkeep() {
    loop {
        tokio::time::sleep(Duration::from_secs(10)).await;
        if let Some(handle) = INSTALLED.get() {
            memlane_net::task::aside(|| handle.run_upkeep()).await;
        }
    }
}

/// Creates the counters of a port with 0, so that Prometheus sees their first increase.
pub fn port(name: &str) {
    carried(name, true, Totals::default());
    carried(name, false, Totals::default());
    counter!(LANES_LOST, "port" => name.to_owned()).increment(0);
    counter!(LANES_REOPENED, "port" => name.to_owned()).increment(0);
    gauge!(BANDWIDTH, "port" => name.to_owned()).increment(0.0);
}

/// Records how long it took to write the journal to disk.
pub fn journal_synced(took: Duration) {
    histogram!(JOURNAL_SYNC).record(took);
}

/// Records the measurements of the engine.
pub struct Metrics;

impl Observer for Metrics {
    fn measured(&self, measurement: Measurement<'_>) {
        match measurement {
            Measurement::Ended(outcome) => {
                counter!(MIGRATIONS, "outcome" => views::outcome(outcome).as_str()).increment(1);
            }
            Measurement::Refused(reason) => counter!(REFUSALS, "reason" => reason).increment(1),
            Measurement::Holes { pages } => counter!(PAGES_SENT, "kind" => "hole").increment(pages),
            Measurement::Carried { port, sending, fresh } => carried(port.as_str(), sending, fresh),
            Measurement::LanesLost { port, lanes } => {
                counter!(LANES_LOST, "port" => port.to_string()).increment(lanes.into());
            }
            Measurement::LaneReopened { port } => {
                counter!(LANES_REOPENED, "port" => port.to_string()).increment(1);
            }
            Measurement::Iteration { took, dirtied_pages } => {
                histogram!(ROUND).record(took);
                counter!(DIRTY_PAGES).increment(dirtied_pages);
            }
            Measurement::NotConverging(remedy) => counter!(NOT_CONVERGING, "remedy" => remedy).increment(1),
            Measurement::TrackingStarted(took) => histogram!(TRACKING_START).record(took),
            Measurement::Downtime { actual, predicted, limit } => {
                histogram!(DOWNTIME).record(actual);
                histogram!(DOWNTIME_PREDICTED).record(predicted);
                histogram!(DOWNTIME_ERROR).record(actual.abs_diff(predicted));
                counter!(LIMIT_EXCEEDED).increment((actual > limit).into());
            }
            Measurement::BlockIoStalled(stall) => histogram!(IO_STALL).record(stall),
            Measurement::StunBegan(took) => histogram!(STUN_SWITCH).record(took),
            Measurement::Stunned { before, now } => stunned(before, now),
            Measurement::Fetched { before, now } => fetched(before, now),
        }
    }

    fn announced(&self) -> fn() {
        || counter!(ANNOUNCEMENTS).increment(1)
    }
}

impl FaultObserver for Metrics {
    fn waited(&self, time: Duration) {
        histogram!(FAULT).record(time);
    }

    fn took(&self, leg: FaultStage, time: Duration) {
        let name = match leg {
            FaultStage::Request => FAULT_ASK,
            FaultStage::Transfer => FAULT_TRANSFER,
            FaultStage::Place => FAULT_PLACE,
        };
        histogram!(name).record(time);
    }
}

fn carried(port: &str, sending: bool, fresh: Totals) {
    let count = |name: &'static str, bytes| counter!(name, "port" => port.to_owned()).increment(bytes);
    if !sending {
        return count(BYTES_RECEIVED, fresh.wire_bytes);
    }
    count(BYTES_SENT, fresh.wire_bytes);
    count(ZERO_COPY_BYTES, fresh.zero_copy_bytes);
    count(COPIED_BYTES, fresh.copied_bytes);
    count(UNCOMPRESSED_BYTES, fresh.uncompressed_bytes);
    count(COMPRESSED_BYTES, fresh.compressed_bytes);
    counter!(PAGES_SENT, "kind" => "data").increment(fresh.data_pages);
    counter!(PAGES_SENT, "kind" => "zero").increment(fresh.zero_pages);
}

fn fetched(before: &FetchReport, now: &FetchReport) {
    counter!(FAULTS).increment(now.faults.saturating_sub(before.faults));
    let fetched = now.pages_fetched.saturating_sub(before.pages_fetched);
    counter!(FETCHED_PAGES, "by" => "fault").increment(fetched);
    let streamed = now.pages_streamed.saturating_sub(before.pages_streamed);
    counter!(FETCHED_PAGES, "by" => "stream").increment(streamed);
}

fn stunned(before: &StunReport, now: &StunReport) {
    /// Counters are whole numbers, and one stun may take less than a second.
    static NANOSECONDS: AtomicU64 = AtomicU64::new(0);
    let passed = now.in_force.saturating_sub(before.in_force).as_nanos() as u64;
    let nanoseconds = NANOSECONDS.fetch_add(passed, Ordering::Relaxed) + passed;
    counter!(STUN_SECONDS).absolute(nanoseconds / 1_000_000_000);
    counter!(STUN_RELEASED).increment(now.released_pages.saturating_sub(before.released_pages));
}

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
    now(&[], &[], []);
    use Outcome::{Cancelled, Completed, Failed, Lost, PoweredOff, Refused};
    for outcome in [Completed, Failed, Cancelled, Refused, Lost, PoweredOff] {
        counter!(MIGRATIONS, "outcome" => views::outcome(outcome).as_str()).increment(0);
    }
    let reasons = RefusalKind::ALL.map(RefusalKind::name);
    for reason in reasons.into_iter().chain([BY_SOURCE]) {
        counter!(REFUSALS, "reason" => reason).increment(0);
    }
    for remedy in ["stun", "postcopy", "give_up"] {
        counter!(NOT_CONVERGING, "remedy" => remedy).increment(0);
    }
    counter!(LIMIT_EXCEEDED).increment(0);
    for kind in ["data", "zero", "hole"] {
        counter!(PAGES_SENT, "kind" => kind).increment(0);
    }
    counter!(DIRTY_PAGES).increment(0);
    stunned(&StunReport::default(), &StunReport::default());
    fetched(&FetchReport::default(), &FetchReport::default());
    counter!(ANNOUNCEMENTS).increment(0);
}

#[cfg(test)]
mod tests;
