//! What a seed draws: sizes, rates, orders, and which kinds of trouble there are. Each seed draws its own mix, so that
//! some runs meet one kind of trouble all the time, and others many kinds, or none (swarm testing).

use std::time::Duration;

use memlane_protocol::convergence::{Converge, Policy, Postcopy};

use crate::dice::Dice;
use crate::network::Path;
use crate::trouble::Kind;

const US: Duration = Duration::from_micros(1);
const MS: Duration = Duration::from_millis(1);
/// A path carries so many bytes per second at least: a lane acknowledges its first window well before it is silent.
pub(crate) const LEAST_RATE: u64 = 4_000_000;

/// What a run is like.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub pages: u64,
    /// The guest has written so many pages before the run.
    pub filled_pages: u64,
    pub used_pages: u64,
    pub hot_pages: u64,
    pub hot_percent: u64,
    /// The guest goes through its pages in steps of this length, which has no factor in common with their number.
    pub stride: u64,
    pub vcpus: usize,
    pub write_percent: u64,
    /// An access of a vCPU takes this long.
    pub access_time: Duration,
    /// vCPUs run for this long at a time.
    pub tick: Duration,
    pub device_writes: u64,
    /// The paths: first that of the daemons, then those of ports.
    pub paths: Vec<Path>,
    pub lanes_per_path: usize,
    pub socket_buffer: Duration,
    pub silence: Duration,
    pub compressed_percent: u64,
    /// The VMMs are linked: a paused one resumes without its daemon. If not, they are QEMUs.
    pub linked: bool,
    /// Waiting VMMs were started for one migration only.
    pub launched: bool,
    pub command_time: Duration,
    pub attach_time: Duration,
    pub state_time: Duration,
    pub state_bytes: usize,
    pub sync_time: Duration,
    pub sync_jitter: u64,
    pub piece_pages: u64,
    pub pages_ahead: u64,
    pub policy: Policy,
    /// While the guest is copied, the other host may be out of reach for this long.
    pub patience: Duration,
    /// So many orders may be given.
    pub orders: u32,
    pub order_pause: Duration,
    /// After everything is calm, the guest is moved once more, which must succeed.
    pub encore: bool,
    /// The kinds of trouble that there are. There may be none.
    pub troubles: Vec<Kind>,
    pub trouble_pause: Duration,
    /// What the handover does is met by trouble in so many cases of a thousand.
    pub ambush_permille: u64,
    pub vmm_refuses: u64,
    pub journal_fails: u64,
    /// All trouble ends at this time.
    pub calm_at: Duration,
}

impl Plan {
    pub(crate) fn draw(dice: &mut Dice) -> Self {
        let pages = dice.scale(64, 2048);
        let used_pages = dice.between(pages / 4, pages);
        let total_rate = dice.scale(4_000_000, 160_000_000);
        let ports = dice.between(1, 4);
        let (latency, jitter) = (dice.scaled_time(20 * US, 30 * MS), dice.pick(&[0, 10, 50, 200]));
        // Words may take a longer way than pages.
        let control = latency * dice.pick(&[1, 1, 1, 4, 20]);
        let mut paths = vec![Path::new(100_000_000, control.min(300 * MS), jitter)];
        for _ in 0..ports {
            let rate = total_rate / ports / dice.pick(&[1, 1, 1, 4]);
            paths.push(Path::new(rate.max(LEAST_RATE), latency + dice.time(Duration::ZERO, latency), jitter));
        }
        // Accesses a second, from next to none to several times what the network carries.
        let carried = total_rate / 4096;
        let accesses = (carried * dice.pick(&[1, 10, 50, 100, 300]) / 100).clamp(50, 60_000);
        let vcpus = dice.between(1, 4);
        let calm = dice.permille(150);
        let troubles: Vec<Kind> = Kind::ALL.into_iter().filter(|_| !calm && dice.permille(350)).collect();
        let state_bytes = dice.scale(1 << 10, 256 << 10) as usize;
        Self {
            pages,
            filled_pages: dice.between(0, used_pages),
            used_pages,
            hot_pages: dice.between(1, (used_pages / 8).max(1)),
            hot_percent: dice.pick(&[0, 50, 90, 99]),
            stride: dice.pick(&[1, 7919, 104_729]),
            vcpus: vcpus as usize,
            write_percent: dice.pick(&[5, 30, 60, 100]),
            access_time: Duration::from_nanos(1_000_000_000 * vcpus / accesses),
            tick: dice.pick(&[MS, 3 * MS, 7 * MS]),
            device_writes: dice.pick(&[0, 1, 5]),
            paths,
            lanes_per_path: dice.pick(&[1, 1, 2]),
            socket_buffer: dice.scaled_time(MS, 20 * MS),
            silence: dice.pick(&[2000 * MS, 5000 * MS]),
            compressed_percent: dice.pick(&[100, 100, 30, 90]),
            linked: dice.permille(600),
            launched: dice.permille(500),
            command_time: dice.scaled_time(20 * US, 5 * MS),
            attach_time: dice.pick(&[20 * MS, 1000 * MS]),
            state_time: dice.scaled_time(MS / 2, 20 * MS),
            state_bytes,
            sync_time: dice.scaled_time(100 * US, 20 * MS),
            sync_jitter: if calm { 10 } else { 90 },
            piece_pages: dice.scale(8, 512),
            pages_ahead: dice.scale(32, 2048),
            policy: policy(dice),
            patience: dice.pick(&[Duration::ZERO, 1000 * MS, 5000 * MS, 30_000 * MS, 30_000 * MS]),
            orders: dice.pick(&[1, 2, 2, 4]),
            order_pause: dice.scaled_time(10 * MS, 1000 * MS),
            encore: dice.permille(300),
            trouble_pause: dice.scaled_time(2 * MS, 1000 * MS),
            ambush_permille: if calm { 0 } else { dice.pick(&[0, 0, 50, 200]) },
            vmm_refuses: if calm { 0 } else { dice.pick(&[0, 0, 0, 100]) },
            journal_fails: if calm { 0 } else { dice.pick(&[0, 0, 0, 100]) },
            calm_at: if calm { Duration::from_secs(15) } else { dice.scaled_time(500 * MS, 8000 * MS) },
            troubles,
        }
    }

    /// Tells whether nothing goes wrong in the run.
    pub(crate) fn is_calm(&self) -> bool {
        self.troubles.is_empty() && self.ambush_permille + self.vmm_refuses + self.journal_fails == 0
    }
}

fn policy(dice: &mut Dice) -> Policy {
    Policy {
        downtime_limit: dice.pick(&[10 * MS, 60 * MS, 100 * MS, 300 * MS, 300 * MS, 1000 * MS, 3000 * MS]),
        max_iterations: dice.pick(&[2, 8, 20]),
        converge: dice.pick(&[Converge::None, Converge::Stun, Converge::Postcopy, Converge::Auto]),
        max_stun_percent: dice.pick(&[50, 75, 99]),
        postcopy: dice.pick(&[None, None, None, Some(Postcopy::Now), Some(Postcopy::Hybrid)]),
    }
}
