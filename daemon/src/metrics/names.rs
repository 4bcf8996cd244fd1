//! Names, kinds, units and help texts of all metrics.

use metrics::Unit;

pub(super) const GUESTS: &str = "memlane_guests";
pub(super) const GUEST_RAM: &str = "memlane_guest_ram_bytes";
pub(super) const AVAILABLE_MEMORY: &str = "memlane_available_memory_bytes";
pub(super) const MIGRATIONS_ACTIVE: &str = "memlane_migrations_active";
pub(super) const IN_DOUBT: &str = "memlane_migrations_in_doubt";
pub(super) const OLDEST_MIGRATION: &str = "memlane_oldest_migration_start_timestamp_seconds";
pub(super) const MIGRATIONS: &str = "memlane_migrations_total";
pub(super) const REFUSALS: &str = "memlane_preflight_refusals_total";
pub(super) const PORT_UP: &str = "memlane_port_up";
pub(super) const PEER_REACHABLE: &str = "memlane_peer_reachable";
pub(super) const BYTES_SENT: &str = "memlane_bytes_sent_total";
pub(super) const BYTES_RECEIVED: &str = "memlane_bytes_received_total";
pub(super) const ZERO_COPY_BYTES: &str = "memlane_zero_copy_bytes_total";
pub(super) const COPIED_BYTES: &str = "memlane_copied_bytes_total";
pub(super) const UNCOMPRESSED_BYTES: &str = "memlane_uncompressed_bytes_total";
pub(super) const COMPRESSED_BYTES: &str = "memlane_compressed_bytes_total";
pub(super) const BANDWIDTH: &str = "memlane_bandwidth_bytes_per_second";
pub(super) const LANES_LOST: &str = "memlane_lanes_lost_total";
pub(super) const LANES_REOPENED: &str = "memlane_lanes_reopened_total";
pub(super) const PAGES_SENT: &str = "memlane_pages_sent_total";
pub(super) const DIRTY_PAGES: &str = "memlane_dirty_pages_total";
pub(super) const REMAINING_PAGES: &str = "memlane_precopy_remaining_pages";
pub(super) const NOT_CONVERGING: &str = "memlane_not_converging_total";
pub(super) const ROUND: &str = "memlane_round_seconds";
pub(super) const TRACKING_START: &str = "memlane_tracking_start_seconds";
pub(super) const DOWNTIME: &str = "memlane_downtime_seconds";
pub(super) const DOWNTIME_PREDICTED: &str = "memlane_downtime_predicted_seconds";
pub(super) const DOWNTIME_ERROR: &str = "memlane_downtime_prediction_error_seconds";
pub(super) const LIMIT_EXCEEDED: &str = "memlane_downtime_limit_exceeded_total";
pub(super) const IO_STALL: &str = "memlane_block_io_stall_seconds";
pub(super) const STUN_SWITCH: &str = "memlane_stun_switch_seconds";
pub(super) const STUN_SECONDS: &str = "memlane_stun_seconds_total";
pub(super) const STUN_RELEASED: &str = "memlane_stun_released_pages_total";
pub(super) const MISSING_PAGES: &str = "memlane_postcopy_missing_pages";
pub(super) const FAULTS: &str = "memlane_postcopy_faults_total";
pub(super) const FETCHED_PAGES: &str = "memlane_postcopy_pages_total";
pub(super) const FAULT: &str = "memlane_postcopy_fault_seconds";
pub(super) const FAULT_ASK: &str = "memlane_postcopy_fault_ask_seconds";
pub(super) const FAULT_TRANSFER: &str = "memlane_postcopy_fault_transfer_seconds";
pub(super) const FAULT_PLACE: &str = "memlane_postcopy_fault_place_seconds";
pub(super) const JOURNAL_SYNC: &str = "memlane_journal_sync_seconds";
pub(super) const JOURNAL_FREE: &str = "memlane_journal_filesystem_free_bytes";
pub(super) const JOURNAL_SIZE: &str = "memlane_journal_filesystem_size_bytes";
pub(super) const INSECURE: &str = "memlane_insecure";
pub(super) const LOG_LINES_LOST: &str = "memlane_log_lines_lost_total";
pub(super) const CERTIFICATE_EXPIRES: &str = "memlane_certificate_expires_timestamp_seconds";
pub(super) const ANNOUNCEMENTS: &str = "memlane_announcements_total";

/// The kind of a metric.
pub(super) enum Kind {
    /// The value only grows.
    Counter,
    /// The value goes up and down.
    Gauge,
    /// The metric is a histogram with these buckets.
    Histogram(&'static [f64]),
}

impl Kind {
    /// Returns the name that Prometheus gives the kind.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

/// These buckets, in seconds, are for pauses, for steps within a pause, and for the start of tracking.
pub(super) const SHORT: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1.0, 2.5, 10.0,
];
/// These buckets, in seconds, are for rounds of up to a terabyte on a slow network.
pub(super) const LONG: &[f64] =
    &[0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0];
/// These buckets, in seconds, are for a page on its way over a network. Their ratios are about equal (the series E6 of
/// IEC 60063), so that a quantile is exact within a fifth.
pub(super) const WIRE: &[f64] = &[
    0.000_01, 0.000_015, 0.000_022, 0.000_033, 0.000_047, 0.000_068, 0.0001, 0.000_15, 0.000_22, 0.000_33,
    0.000_47, 0.000_68, 0.001, 0.0015, 0.0022, 0.0033, 0.0047, 0.0068, 0.01, 0.015, 0.022, 0.033, 0.047,
    0.068, 0.1, 0.22, 0.47, 1.0, 2.2, 4.7, 10.0,
];
/// These buckets, in seconds, are for writes to disk.
pub(super) const DISK: &[f64] =
    &[0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0];

/// This table lists the name, kind, unit and help text of all metrics.
pub(super) const ALL: [(&str, Kind, Unit, &str); 47] = [
    (GUESTS, Kind::Gauge, Unit::Count, "Guests whose VMM is attached."),
    (GUEST_RAM, Kind::Gauge, Unit::Bytes, "RAM that these guests have."),
    (
        AVAILABLE_MEMORY,
        Kind::Gauge,
        Unit::Bytes,
        "Memory of this host that can be used without swapping (MemAvailable).",
    ),
    (
        MIGRATIONS_ACTIVE,
        Kind::Gauge,
        Unit::Count,
        "Migrations under way, by this host's role in them and by phase.",
    ),
    (
        IN_DOUBT,
        Kind::Gauge,
        Unit::Count,
        "Migrations of which this host does not know which host owns the guest, which stands still.",
    ),
    (
        OLDEST_MIGRATION,
        Kind::Gauge,
        Unit::Seconds,
        "When the oldest migration under way was ordered, as a Unix time; 0 while none is.",
    ),
    (
        MIGRATIONS,
        Kind::Counter,
        Unit::Count,
        "Migrations that ended, by outcome; both hosts of a migration count it.",
    ),
    (REFUSALS, Kind::Counter, Unit::Count, "Orders that the preflight refused, by reason."),
    (PORT_UP, Kind::Gauge, Unit::Count, "1 if a port has a link and its address, else 0, by port."),
    (PEER_REACHABLE, Kind::Gauge, Unit::Count, "1 if the daemon of a peer answered lately, else 0, by peer."),
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
    (
        REMAINING_PAGES,
        Kind::Gauge,
        Unit::Count,
        "Pages that are yet to be sent in the present rounds of guests that are copied from here.",
    ),
    (
        NOT_CONVERGING,
        Kind::Counter,
        Unit::Count,
        "How often a guest was found to write faster than it is sent, by remedy: stun, postcopy, give_up.",
    ),
    (ROUND, Kind::Histogram(LONG), Unit::Seconds, "Length of rounds of pre-copy."),
    (TRACKING_START, Kind::Histogram(SHORT), Unit::Seconds, "Time to begin to track a guest's writes."),
    (DOWNTIME, Kind::Histogram(SHORT), Unit::Seconds, "Downtime: how long guests stood still."),
    (DOWNTIME_PREDICTED, Kind::Histogram(SHORT), Unit::Seconds, "Downtime as predicted at switchover."),
    (DOWNTIME_ERROR, Kind::Histogram(SHORT), Unit::Seconds, "How far downtime and prediction lay apart."),
    (LIMIT_EXCEEDED, Kind::Counter, Unit::Count, "Pauses that were longer than the order allowed."),
    (
        IO_STALL,
        Kind::Histogram(SHORT),
        Unit::Seconds,
        "How long block I/O of guests stood still so that memory could be read.",
    ),
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
    (
        JOURNAL_FREE,
        Kind::Gauge,
        Unit::Bytes,
        "Bytes that the daemon can still write to the file system of its journal.",
    ),
    (JOURNAL_SIZE, Kind::Gauge, Unit::Bytes, "Size of the file system of the journal."),
    (INSECURE, Kind::Gauge, Unit::Count, "1 while the traffic between daemons is not encrypted, else 0."),
    (
        CERTIFICATE_EXPIRES,
        Kind::Gauge,
        Unit::Seconds,
        "When the certificate of this host expires, as a Unix time; 0 while nothing is encrypted.",
    ),
    (ANNOUNCEMENTS, Kind::Counter, Unit::Count, "Announcements (RARP) sent for guests that arrived."),
    (LOG_LINES_LOST, Kind::Counter, Unit::Count, "Lines of the log that its reader was too slow for."),
];
