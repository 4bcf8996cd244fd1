//! What came of runs.

use std::fmt;
use std::ops::AddAssign;
use std::time::Duration;

use memlane_protocol::handover::Outcome;

/// What came of one seed.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// The seed.
    pub seed: u64,
    /// What must not be and was, if anything.
    pub violation: Option<String>,
    /// What happened, in numbers.
    pub tally: Tally,
    /// What happened, line by line, if that was asked for.
    pub trace: Vec<String>,
}

/// What happened in runs, in numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Runs.
    pub seeds: u64,
    /// Events.
    pub events: u64,
    /// The time that passed in the runs.
    pub virtual_time: Duration,
    /// Orders that were taken.
    pub orders: u64,
    /// Pauses after which the guest ran at the other host.
    pub moved: u64,
    /// Sources that reported that the guest was passed on.
    pub completed: u64,
    /// Sources that reported that the guest was kept, for any reason.
    pub kept: u64,
    /// Sources that reported that the guest was given back.
    pub taken_back: u64,
    /// Sources that reported that the guest was lost, or its VMM gone.
    pub source_lost: u64,
    /// Runs at whose end nobody had the guest.
    pub lost: u64,
    /// Stuns, or changes of them.
    pub stunned: u64,
    /// Migrations that went on to post-copy.
    pub postcopies: u64,
    /// Last moves that succeeded.
    pub encores: u64,
    /// Lanes that were lost in pre-copy.
    pub lanes_lost: u64,
    /// Connections of migrations that were lost while the guest was copied, seen from each host.
    pub suspended: u64,
    /// Connections of migrations that went on over another one.
    pub resumed: u64,
    /// Connections that came too late to go on with: the guest was paused already.
    pub reunited_late: u64,
    /// Guests that a restarted daemon went on to fetch.
    pub reopened: u64,
    /// Daemons that crashed.
    pub crashes: u64,
    /// Migrations that a restarted daemon took up.
    pub recovered: u64,
    /// Things that went wrong.
    pub troubles: u64,
    /// The longest pause in a run in which nothing went wrong.
    pub longest_pause: Duration,
}

impl Tally {
    pub(crate) fn ended(&mut self, is_source: bool, outcome: Outcome) {
        let counter = match outcome {
            _ if !is_source => return,
            Outcome::Completed => &mut self.completed,
            Outcome::Refused | Outcome::Cancelled | Outcome::Failed => &mut self.kept,
            Outcome::TakenBack => &mut self.taken_back,
            Outcome::VmmGone | Outcome::PoweredOff | Outcome::Lost | Outcome::GivenUp => {
                &mut self.source_lost
            }
        };
        *counter += 1;
    }
}

impl AddAssign<&Self> for Tally {
    fn add_assign(&mut self, other: &Self) {
        self.seeds += other.seeds;
        self.events += other.events;
        self.virtual_time += other.virtual_time;
        self.orders += other.orders;
        self.moved += other.moved;
        self.completed += other.completed;
        self.kept += other.kept;
        self.taken_back += other.taken_back;
        self.source_lost += other.source_lost;
        self.lost += other.lost;
        self.stunned += other.stunned;
        self.postcopies += other.postcopies;
        self.encores += other.encores;
        self.lanes_lost += other.lanes_lost;
        self.suspended += other.suspended;
        self.resumed += other.resumed;
        self.reunited_late += other.reunited_late;
        self.reopened += other.reopened;
        self.crashes += other.crashes;
        self.recovered += other.recovered;
        self.troubles += other.troubles;
        self.longest_pause = self.longest_pause.max(other.longest_pause);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seeds, events, virtual_time, orders, moved, completed, kept, taken_back, .. } = self;
        let Self { source_lost, lost, stunned, postcopies, encores, lanes_lost, crashes, .. } = self;
        let Self { recovered, troubles, longest_pause, suspended, resumed, reopened, reunited_late, .. } =
            self;
        let hours = virtual_time.as_secs_f64() / 3600.0;
        writeln!(f, "{seeds} seeds, {events} events, {hours:.1} hours of virtual time")?;
        writeln!(
            f,
            "{orders} orders: the guest moved {moved} times; {completed} completed, {kept} kept, {taken_back} taken \
             back, {source_lost} lost with a VMM, a daemon or by order"
        )?;
        writeln!(f, "{postcopies} went on to post-copy; stun was set or changed {stunned} times")?;
        writeln!(
            f,
            "{troubles} things went wrong: {lanes_lost} lanes lost, {crashes} daemons crashed, {recovered} migrations \
             taken up again; {encores} last moves went well"
        )?;
        writeln!(
            f,
            "{suspended} halves waited for their peer: {resumed} migrations went on over another connection, which came \
             too late for {reunited_late}; {reopened} guests were fetched on by another daemon"
        )?;
        write!(
            f,
            "at the end {lost} guests were lost, as documented; the longest pause where nothing went wrong took {:.1} ms",
            longest_pause.as_secs_f64() * 1e3
        )
    }
}
