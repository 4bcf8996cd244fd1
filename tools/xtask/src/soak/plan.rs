//! The plan of a step: all of it follows from the seed, the step's number and the number of guests. From which host to which
//! a guest goes depends on where it is.

use super::policy::MovePolicy;
use super::trouble::PlannedTrouble;
use crate::common::dice::Dice;
use crate::torture::plan::{Blow, RoundPlan, Victim};

/// The steps after which everything repeats: in the first of them daemons end, in the others they live on.
const CYCLE: u64 = 50;
/// The steps of a cycle in which daemons may end.
const ROUGH: u64 = 20;

/// The plan of a step.
#[derive(Clone, Debug)]
pub(crate) struct StepPlan {
    /// The number of the step, from 0.
    pub step: u64,
    /// What is done in it.
    pub kind: StepKind,
}

/// What is done in a step.
#[derive(Clone, Debug)]
pub(crate) enum StepKind {
    /// Guests of the fleet are moved, one or two, while troubles come.
    Moves { moves: Vec<MovePlan>, troubles: Vec<PlannedTrouble> },
    /// A guest that is started for it is moved, and one of its VMMs is killed or stands still.
    Victim(RoundPlan),
}

/// The plan of a guest's move.
#[derive(Clone, Debug)]
pub(crate) struct MovePlan {
    /// The place of the guest in the fleet.
    pub guest: usize,
    /// What the order says.
    pub policy: MovePolicy,
}

impl StepPlan {
    /// Makes the plan of a step for a fleet of so many guests. Without KVM the guests that are started for it are processes.
    pub(crate) fn new(seed: u64, step: u64, guests: usize, kvm: bool) -> Self {
        let mut dice = Dice::of_round(seed, step);
        if dice.percent(7) {
            return Self { step, kind: StepKind::Victim(victim(seed, step, kvm)) };
        }
        let all: Vec<usize> = (0..guests).collect();
        let mut chosen = vec![dice.pick(&all)];
        let other = dice.pick(&all);
        if dice.percent(15) && other != chosen[0] {
            chosen.push(other);
        }
        let moves =
            chosen.into_iter().map(|guest| MovePlan { guest, policy: MovePolicy::draw(&mut dice) }).collect();
        let troubles = PlannedTrouble::draw(&mut dice, is_calm(step));
        Self { step, kind: StepKind::Moves { moves, troubles } }
    }
}

/// Returns whether daemons live on in this step, so that there are some whose use of the machine can be watched for long.
fn is_calm(step: u64) -> bool {
    step % CYCLE >= ROUGH
}

/// Makes the plan of a round of torture in which VMMs alone are struck.
fn victim(seed: u64, step: u64, kvm: bool) -> RoundPlan {
    let mut plan = RoundPlan::new(seed, step, kvm);
    plan.strikes.truncate(1);
    plan.again = false;
    for strike in &mut plan.strikes {
        strike.victim = match strike.victim {
            Victim::SourceDaemon => Victim::SourceVmm,
            Victim::DestinationDaemon => Victim::DestinationVmm,
            vmm => vmm,
        };
        // A VMM that was killed is not started again.
        if let Blow::Kill(away) = &mut strike.blow {
            *away = std::time::Duration::ZERO;
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::super::policy::MoveWay;
    use super::super::trouble::{KINDS, Trouble};
    use super::*;

    #[test]
    fn steps_cover_every_way_trouble_and_guest() {
        let plans: Vec<StepPlan> = (0..2000).map(|step| StepPlan::new(1, step, 5, true)).collect();
        let moved = |plan: &StepPlan| match &plan.kind {
            StepKind::Moves { moves, troubles } => (moves.clone(), troubles.clone()),
            StepKind::Victim(_) => (Vec::new(), Vec::new()),
        };
        let (mut ways, mut kinds, mut guests) = ([0; MoveWay::ALL.len()], [0; KINDS.len()], [0; 5]);
        let (mut pairs, mut victims) = (0, 0);
        for plan in &plans {
            let (moves, troubles) = moved(plan);
            pairs += usize::from(moves.len() == 2);
            victims += usize::from(matches!(plan.kind, StepKind::Victim(_)));
            for MovePlan { guest, policy } in moves {
                guests[guest] += 1;
                ways[MoveWay::ALL.iter().position(|way| *way == policy.way).expect("one of all")] += 1;
                assert!(!policy.verify || matches!(policy.way, MoveWay::Precopy | MoveWay::Stun));
            }
            for PlannedTrouble { trouble, .. } in troubles {
                kinds[trouble.kind()] += 1;
                let ends = matches!(trouble, Trouble::DaemonKilled { .. } | Trouble::DaemonRestarted { .. });
                assert!(!ends || plan.step % CYCLE < ROUGH, "{plan:?}");
            }
        }
        let enough = |counts: &[usize]| counts.iter().all(|count| *count > 20);
        assert!(enough(&ways) && enough(&kinds) && enough(&guests), "{ways:?} {kinds:?} {guests:?}");
        assert!(pairs > 50 && victims > 50, "{pairs} {victims}");
    }

    #[test]
    fn a_step_is_the_same_each_time() {
        let text = |seed| format!("{:?}", StepPlan::new(seed, 3, 5, true));
        assert_eq!(text(1), text(1));
        assert_ne!(text(1), text(2));
    }

    #[test]
    fn victims_are_vmms() {
        let daemons =
            |plan: &RoundPlan| plan.strikes.iter().filter(|strike| strike.victim.is_daemon()).count();
        assert!((0..200).all(|step| daemons(&victim(1, step, true)) == 0));
    }
}
