//! What the lanes of a migration share at the source. This is a model of `SendState` of `daemon/lane`, over the real
//! [`PageSet`] and its claims.

use std::collections::BTreeMap;
use std::time::Duration;

use memlane_protocol::window::hold;
use memlane_protocol::wire::frame::{MAX_RUNS, Run, contents_bytes};
use memlane_protocol::{PAGE_SIZE, PageSet};

use crate::memory::Memory;

const FRAME_BYTES: u64 = 1 << 20;
const STREAM_FRAME_BYTES: u64 = 64 << 10;
const SMALL_FRAME_BYTES: u64 = 16 << 10;
const SMALL_FRAMES: u32 = 8;
const SMALLEST_SHARE: u64 = 64 << 10;
const ZEROS_BESIDE: u64 = 8;

#[derive(Debug)]
pub(crate) struct Outbound {
    pub dirty: PageSet,
    pub in_flight: PageSet,
    /// Pages to send may be holes.
    pub sparse: bool,
    quiesced: bool,
    /// Claims that have begun, and those that are over.
    claims: u64,
    settled: u64,
    /// What lost lanes left unacknowledged.
    orphans: BTreeMap<u16, Vec<Vec<Run>>>,
    zeros_beside: u64,
    largest_frame: u64,
    frame_bytes: u64,
    backlog: u64,
    bytes_per_second: u64,
    fault_cursor: Option<u64>,
    small_frames: u32,
}

impl Outbound {
    /// Makes the state for lanes that send while the guest runs.
    pub(crate) fn new(pages: u64) -> Self {
        Self::make(pages, FRAME_BYTES, ZEROS_BESIDE)
    }

    /// Makes the state for lanes that send the memory of a guest that runs at the destination.
    pub(crate) fn of_paused_guest(pages: u64) -> Self {
        Self::make(pages, STREAM_FRAME_BYTES, 1)
    }

    fn make(pages: u64, largest_frame: u64, zeros_beside: u64) -> Self {
        Self {
            dirty: PageSet::new(pages),
            in_flight: PageSet::new(pages),
            sparse: false,
            quiesced: false,
            claims: 0,
            settled: 0,
            orphans: BTreeMap::new(),
            zeros_beside,
            largest_frame,
            frame_bytes: largest_frame,
            backlog: 0,
            bytes_per_second: 0,
            fault_cursor: None,
            small_frames: 0,
        }
    }

    /// Tells `lanes` lanes, which deliver so much together, that there are pages to claim, and that more will come.
    pub(crate) fn publish(&mut self, to_come: u64, lanes: u64, bytes_per_second: u64) {
        let pages = self.dirty.count() + to_come;
        let share = pages * PAGE_SIZE / (2 * lanes.max(1));
        self.frame_bytes = share.clamp(SMALLEST_SHARE, self.largest_frame);
        (self.backlog, self.bytes_per_second) = (pages, bytes_per_second);
    }

    /// Returns how much a lane may have in its window, as the time in which it delivers that.
    pub(crate) fn lane_share(&self) -> Duration {
        hold(self.backlog * PAGE_SIZE, self.bytes_per_second)
    }

    pub(crate) fn on_page_request(&mut self, page: u64) {
        (self.fault_cursor, self.small_frames) = (Some(page + 1), SMALL_FRAMES);
        self.dirty.remove_range(page..page + 1);
    }

    pub(crate) fn quiesce(&mut self) {
        self.quiesced = true;
    }

    pub(crate) fn is_quiesced(&self) -> bool {
        self.quiesced
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.settled == self.claims
    }

    pub(crate) fn all_acknowledged(&self) -> bool {
        self.is_settled() && self.dirty.is_empty()
    }

    /// Claims pages for one frame. If there are any, the end of the claim is told by [`acknowledge`](Self::acknowledge)
    /// or [`take_back`](Self::take_back).
    pub(crate) fn claim(&mut self, cursor: &mut u64, most_bytes: u64, memory: &Memory) -> Vec<Run> {
        let mut runs = Vec::new();
        if self.quiesced {
            return runs;
        }
        if let Some(behind_fault) = self.fault_cursor.take() {
            *cursor = behind_fault;
        }
        let whole = self.zeros_beside;
        let mut room = self.room().min(most_bytes) / PAGE_SIZE * whole;
        let mut wrapped = false;
        while room >= whole && runs.len() < MAX_RUNS {
            let most = (room / whole).min((MAX_RUNS - runs.len()) as u64);
            let Some(pages) = self.dirty.claim(&self.in_flight, *cursor, most) else {
                if wrapped || *cursor == 0 {
                    break;
                }
                (wrapped, *cursor) = (true, 0);
                continue;
            };
            *cursor = pages.end;
            self.backlog = self.backlog.saturating_sub(pages.end - pages.start);
            for page in pages {
                let content = memory.content(page, self.sparse);
                match runs.last_mut() {
                    Some(Run { pages, content: last }) if *last == content && pages.end == page => {
                        pages.end += 1;
                    }
                    _ => runs.push(Run { pages: page..page + 1, content }),
                }
                room -= if contents_bytes(&runs[runs.len() - 1..]) > 0 { whole } else { 1 };
            }
        }
        self.claims += u64::from(!runs.is_empty());
        runs
    }

    fn room(&mut self) -> u64 {
        match self.small_frames.checked_sub(1) {
            Some(left) => {
                self.small_frames = left;
                self.frame_bytes.min(SMALL_FRAME_BYTES)
            }
            None => self.frame_bytes,
        }
    }

    /// Notes that a frame is in memory at the destination.
    pub(crate) fn acknowledge(&mut self, runs: &[Run]) {
        for run in runs {
            self.in_flight.remove_range(run.pages.clone());
        }
        self.settled += 1;
    }

    /// Keeps what a lane that has ended left unacknowledged.
    pub(crate) fn orphan(&mut self, lane: u16, frames: impl Iterator<Item = Vec<Run>>) {
        self.orphans.entry(lane).or_default().extend(frames);
    }

    pub(crate) fn orphaned_lanes(&self) -> Vec<u16> {
        self.orphans.keys().copied().collect()
    }

    /// Makes dirty again what a lost lane left, unless it is to be `forgotten`.
    pub(crate) fn take_back(&mut self, lane: u16, forgotten: bool) {
        let Some(frames) = self.orphans.remove(&lane) else { return };
        for run in frames.iter().flatten() {
            if !forgotten {
                self.dirty.insert_range(run.pages.clone());
            }
            self.in_flight.remove_range(run.pages.clone());
        }
        self.settled += frames.len() as u64;
    }
}
