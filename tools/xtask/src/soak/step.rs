//! A step: guests are ordered to move, troubles come and go, and once nothing is under way any more, everybody is asked.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use memlane_lab::HostId;

use super::fleet::Fleet;
use super::judge::{MoveFacts, MoveFate, id_of, orders_taken, without_known};
use super::plan::MovePlan;
use super::policy::MovePolicy;
use super::trouble::PlannedTrouble;
use super::turmoil::{MadeTrouble, Turmoil};
use crate::common::ask::DaemonView;
use crate::common::order::MigrateCommand;

/// The time from the last trouble's end, and from the orders' end, until nothing must be under way any more. Daemons ask each
/// other every second; tries of an order are seconds apart.
const SETTLE: Duration = Duration::from_secs(120);
/// The time from the last trouble's end until the orders must have ended, on a machine that is busy with other things.
const END: Duration = Duration::from_secs(300);
/// The time between two looks.
const LOOK: Duration = Duration::from_millis(3);
/// The time between two questions to the daemons.
const ASK: Duration = Duration::from_millis(50);

/// A step under way.
pub(crate) struct SoakStep<'a> {
    fleet: &'a mut Fleet,
    interrupted: &'a AtomicBool,
    moves: Vec<MoveUnderWay>,
    turmoil: Turmoil,
    given: Instant,
    /// The migrations of before.
    known: BTreeSet<String>,
}

struct MoveUnderWay {
    guest: usize,
    from: HostId,
    policy: MovePolicy,
    order: MigrateCommand,
    ended: Option<Duration>,
}

/// What came of a move.
#[derive(Clone, Debug)]
pub(crate) struct MoveOutcome {
    /// The name of the guest.
    pub guest: String,
    /// The kind of the guest.
    pub kind: &'static str,
    /// What the order said.
    pub policy: MovePolicy,
    /// All that is known about it.
    pub facts: MoveFacts,
    /// The faults that were found.
    pub faults: Vec<String>,
    /// The time from the order to its end, and to the moment when everybody had been asked.
    pub took: [Duration; 2],
}

impl<'a> SoakStep<'a> {
    /// Sees to it that VMMs wait for the guests, and gives the orders.
    ///
    /// # Errors
    ///
    /// If a VMM does not come up, or an order cannot be given.
    pub(crate) fn begin(
        fleet: &'a mut Fleet,
        interrupted: &'a AtomicBool,
        plans: &[MovePlan],
        troubles: &[PlannedTrouble],
    ) -> Result<Self> {
        for plan in plans {
            fleet.prepare(plan.guest)?;
        }
        let views = fleet.ask()?;
        let known =
            views.iter().flat_map(|view| &view.migrations).filter_map(id_of).map(str::to_owned).collect();
        let first = &fleet.guests[plans[0].guest];
        let turmoil = Turmoil::new(&first.name, first.at, troubles.to_vec());
        let given = Instant::now();
        let mut moves = Vec::new();
        for MovePlan { guest, policy } in plans {
            let from = fleet.guests[*guest].at;
            let (name, host) = (fleet.guests[*guest].name.clone(), fleet.host(from.other()).to_owned());
            let options = policy.words();
            let mut words = vec!["migrate", &name, &host];
            words.extend(options.iter().map(String::as_str));
            let order = MigrateCommand::give(&fleet.rig, from, &words)?;
            moves.push(MoveUnderWay { guest: *guest, from, policy: policy.clone(), order, ended: None });
        }
        Ok(Self { fleet, interrupted, moves, turmoil, given, known })
    }

    /// Lets troubles come and go until nothing is under way any more, and finds out what has become of the guests. Returns
    /// `None` if it was interrupted.
    ///
    /// # Errors
    ///
    /// If the harness itself fails.
    pub(crate) fn play(mut self) -> Result<Option<Vec<MoveOutcome>>> {
        let mut ask_at = Instant::now();
        let unsettled = loop {
            if self.interrupted.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let ended = self.orders_have_ended()?;
            let over = self.turmoil.turn(&mut self.fleet.rig, self.given, !ended)?;
            let since = self.turmoil.last.elapsed();
            if over && !ended && since > END {
                break Some("memlanectl migrate goes on".to_owned());
            }
            if over && ended && Instant::now() >= ask_at {
                let Some(what) = self.under_way() else { break None };
                let last = self.moves.iter().filter_map(|one| one.ended).max().unwrap_or_default();
                let since = since.min(self.given.elapsed().saturating_sub(last));
                if since > SETTLE || !self.turmoil.oddities.is_empty() {
                    break Some(what);
                }
                ask_at = Instant::now() + ASK;
            }
            std::thread::sleep(LOOK);
        };
        self.find_out(unsettled).map(Some)
    }

    fn orders_have_ended(&mut self) -> Result<bool> {
        let mut all = true;
        for one in &mut self.moves {
            let ended = one.order.has_ended()?;
            if ended && one.ended.is_none() {
                one.ended = Some(self.given.elapsed());
            }
            all &= ended;
        }
        Ok(all)
    }

    /// Says in a few words what is still under way, once no trouble is.
    fn under_way(&mut self) -> Option<String> {
        for id in [HostId::A, HostId::B] {
            let daemon = self.fleet.rig.daemon(id);
            if !daemon.is_running() {
                let tail = daemon.log_tail();
                let host = self.fleet.host(id);
                self.turmoil.oddities.push(format!("memlaned at {host} has ended by itself: {tail}"));
                return Some("a daemon is gone".into());
            }
        }
        let views = match self.fleet.ask() {
            Ok(views) => views,
            Err(error) => return Some(format!("{error:#}")),
        };
        unsettled(self.fleet, &views)
    }

    /// Asks guests and daemons, and judges.
    fn find_out(mut self, unsettled: Option<String>) -> Result<Vec<MoveOutcome>> {
        // Without an answer the facts stay empty, and do not fit.
        let views = self.fleet.ask().unwrap_or_default();
        let asked: Vec<_> = std::mem::take(&mut self.turmoil.asked)
            .into_iter()
            .map(|asked| (asked.trouble, asked.command.exit, asked.command.text.clone()))
            .collect();
        let mut outcomes = Vec::new();
        for (number, one) in self.moves.iter_mut().enumerate() {
            if unsettled.is_some() {
                one.order.give_up();
            }
            let hosts = [one.from, one.from.other()];
            let guest = &mut self.fleet.guests[one.guest];
            let about = hosts.map(|id| without_known(views[id as usize].about(&guest.name), &self.known));
            let runs = [0, 1].map(|at| guest.runs(hosts[at], &about[at]));
            let troubles = seen_by(&self.turmoil.made, number == 0, one.from != self.turmoil.from);
            let asked = if number == 0 { asked.clone() } else { Vec::new() };
            let mut facts = MoveFacts {
                hosts: hosts.map(|id| self.fleet.rig.lab().host(id).name().to_owned()),
                runs,
                daemons: about,
                exit: one.order.exit,
                told: std::mem::take(&mut one.order.text),
                must_succeed: one.policy.must_succeed(),
                troubles,
                orders: orders_taken(&asked),
                asked,
                unsettled: unsettled.clone(),
                damage: None,
                oddities: self.turmoil.oddities.clone(),
            };
            if facts.fate() == MoveFate::There {
                self.fleet.guests[one.guest].at = hosts[1];
            }
            facts.oddities.extend(self.fleet.two_owners(one.guest));
            // Who waits for missing memory does not answer before that has come.
            if facts.fate() != MoveFate::Wrong && unsettled.is_none() {
                facts.damage = self.fleet.examine(one.guest).err().map(|error| format!("{error:#}"));
            }
            let guest = &self.fleet.guests[one.guest];
            outcomes.push(MoveOutcome {
                guest: guest.name.clone(),
                kind: guest.kind(),
                policy: one.policy.clone(),
                faults: facts.judge(),
                facts,
                took: [one.ended.unwrap_or_default(), self.given.elapsed()],
            });
        }
        Ok(outcomes)
    }
}

/// Returns the troubles as a guest sees them: the first guest of the step or another one, that goes the same or the other way.
fn seen_by(made: &[MadeTrouble], first: bool, other_way: bool) -> Vec<MadeTrouble> {
    let seen = made.iter().filter(|made| first || !made.trouble.is_about_one_guest());
    seen.map(|made| match other_way {
        true => MadeTrouble { trouble: made.trouble.seen_from_the_other_host(), ..*made },
        false => *made,
    })
    .collect()
}

/// Says in a few words what is under way in a fleet, by what its daemons and VMMs say.
pub(crate) fn unsettled(fleet: &mut Fleet, views: &[DaemonView; 2]) -> Option<String> {
    for (id, view) in [HostId::A, HostId::B].into_iter().zip(views) {
        let host = fleet.host(id).to_owned();
        if let Some(migration) = view.migrations.iter().find(|migration| migration["outcome"].is_null()) {
            let [guest, phase, reason, waits] =
                ["guest", "phase", "reason", "waits_for"].map(|field| migration[field].to_string());
            return Some(format!(
                "{host} tells of a migration of {guest} that is {phase} ({reason}; waits for {waits})"
            ));
        }
        let orders = fleet.rig.config_file(id).with_file_name("journal").join("orders");
        if std::fs::read_dir(orders).is_ok_and(|orders| orders.count() > 0) {
            return Some(format!("{host} is to try an order again"));
        }
        for guest in &mut fleet.guests {
            if let Some(what) = guest.unsettled(id, &view.about(&guest.name)) {
                return Some(format!("{} at {host}: {what}", guest.name));
            }
        }
    }
    let mut guests = fleet.guests.iter_mut();
    guests.find_map(|guest| {
        let [a, b] = views.each_ref().map(|view| view.about(&guest.name));
        let runs = usize::from(guest.runs(HostId::A, &a)) + usize::from(guest.runs(HostId::B, &b));
        (runs != 1).then(|| format!("{} runs on {runs} hosts", guest.name))
    })
}
