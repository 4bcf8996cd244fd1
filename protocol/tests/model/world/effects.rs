//! What comes of a step.

use memlane_protocol::handover::Record;
use memlane_protocol::handover::{Action, Destination, Event, Message, Resolution, Source};

use super::host::{Host, Role, Vmm, bit, record_bit};
use super::memory::Memory;
use super::trouble::Fault;
use super::{Side, Step, World, other};

impl World {
    pub(super) fn take(&mut self, step: Step) {
        match step {
            Step::Deliver { to, message } => self.deliver(to, message),
            Step::LoseAll => {
                self.source.arriving = 0;
                self.destination.arriving = 0;
            }
            Step::Write { at, fails } => self.write(at, fails),
            Step::Obey { at: Side::Source, fails } => self.source_vmm_obeys(fails),
            Step::Obey { at: Side::Destination, fails } => self.destination_vmm_obeys(fails),
            Step::Hear { at, event } => {
                let inbox = &mut self.host_mut(at).inbox;
                let index = inbox.iter().position(|&heard| heard == event).expect("it was offered");
                inbox.remove(index);
                self.tell(at, event);
            }
            Step::Local { at, event: Event::Abandoned } => self.give_up(at),
            Step::Local { at, event } => {
                if event == Event::Cancel {
                    self.budget.cancel = false;
                }
                if event == Event::PeerLost {
                    self.cheat_on_peer_lost(at);
                }
                self.loading |= event == Event::Loading;
                self.tell(at, event);
            }
            Step::Capture => {
                self.captured = true;
                self.stale = self.source.vmm == Vmm::Running;
                if self.budget.postcopy {
                    self.fetch.memory = Memory::Missing;
                }
                self.source.hear(Event::Sent);
            }
            Step::Load { fails: true } => {
                self.budget.vmm -= 1;
                self.destination.hear(Event::Failed);
            }
            Step::Load { fails: false } => {
                self.destination.vmm = Vmm::Loaded;
                self.destination.hear(Event::Loaded);
            }
            Step::Fetch => self.fetch_the_rest(),
            Step::Crash(at) => {
                self.budget.crashes -= 1;
                let host = self.host_mut(at);
                host.up = false;
                host.role = None;
                host.orphaned = host.vmm == Vmm::Paused;
                host.writes.clear();
                host.commands.clear();
                host.inbox.clear();
                self.lose_memory();
            }
            Step::Restart { at, forgetful, damaged } => {
                if forgetful {
                    self.give_up_missing();
                }
                if let Some(found) = damaged {
                    self.budget.damage -= 1;
                    self.damaged = true;
                    let host = self.host_mut(at);
                    host.journal = found;
                    self.forgot_running |= host.past & record_bit(Record::Running) != 0;
                }
                self.restart(at);
            }
            Step::Attach(at) => self.take_up(at, None),
            Step::Burn(at) => {
                self.budget.burn -= 1;
                *self.host_mut(at) = Host { up: false, burned: true, ..Host::new(Vmm::Ended) };
                self.lose_memory();
            }
            Step::Resolve { at, resolution, .. } => {
                match resolution {
                    Resolution::RunHere => self.run_by_order = true,
                    Resolution::Discard => {
                        self.given_up = true;
                        self.fetch.given_up_at_source |= at == Side::Source;
                    }
                }
                self.tell(at, Event::Resolved(resolution));
            }
            Step::Stranger(at) => {
                let answer = match self.host_mut(at).commands.remove(0) {
                    Action::Relinquish => Event::Relinquished,
                    Action::Resume => Event::Resumed,
                    _ => Event::Discarded,
                };
                self.host_mut(at).hear(answer);
            }
            Step::VmmEnds(at) => {
                self.budget.vmm -= 1;
                let host = self.host_mut(at);
                host.vmm = Vmm::Ended;
                host.orphaned = false;
                host.hear(Event::VmmGone);
                self.lose_memory();
            }
            Step::VmmDisconnects => {
                self.budget.vmm -= 1;
                self.source_runs();
                self.source.hear(Event::Failed);
            }
            Step::VmmResumesByItself => self.source_runs(),
        }
    }

    fn deliver(&mut self, to: Side, message: Message) {
        if self.host(to).role.is_some() {
            let heard = match (self.fault, message) {
                (Fault::FetchingIsRunning, Message::Fetching) => Message::Running,
                (Fault::RecoveringIsFetching, Message::Recovering) => Message::Fetching,
                (Fault::UnknownIsDeclined, Message::Unknown) => Message::Declined,
                _ => message,
            };
            return self.tell(to, Event::Message(heard));
        }
        let answer = match to {
            // A daemon that has just started waits for VMMs to attach before it says so.
            Side::Source if self.source.vmm == Vmm::Relinquished => None,
            Side::Source => Source::answer_unknown(message),
            Side::Destination if message == Message::Offer && !self.offered => {
                self.offered = true;
                self.destination.role = Some(Role::Destination(Destination::new()));
                return;
            }
            Side::Destination => Destination::answer_unknown(message),
        };
        self.apply(to, answer.map(Action::Send).into_iter().collect());
    }

    pub(super) fn tell(&mut self, at: Side, event: Event) {
        if let Some(role) = &mut self.host_mut(at).role {
            let actions = role.on(event);
            self.apply(at, actions);
        }
    }

    pub(super) fn apply(&mut self, at: Side, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Send(message) => self.host_mut(other(at)).arriving |= bit(message),
                Action::Journal(_) | Action::Forget => self.host_mut(at).writes.push(action),
                Action::Pause | Action::Relinquish | Action::Resume | Action::Discard => {
                    if self.fault == Fault::ForgetBeforeDiscard && action == Action::Discard {
                        self.host_mut(at).journal = None;
                    }
                    self.host_mut(at).commands.push(action);
                }
                Action::Serve => self.serve(),
                Action::Report(outcome) => self.report(at, outcome),
                Action::Copy => {}
            }
            let host = self.host(at);
            assert!(host.writes.len() + host.commands.len() < 12, "the same is asked for without end");
        }
    }

    fn write(&mut self, at: Side, fails: bool) {
        let fault = self.fault;
        let host = self.host_mut(at);
        match host.writes.remove(0) {
            Action::Journal(record) if fails => {
                host.hear(Event::JournalFailed(record));
                self.budget.journal -= 1;
            }
            Action::Journal(record) => {
                if fault != Fault::NotDurable(record) {
                    host.journal = Some(record);
                    host.past |= record_bit(record);
                }
                host.hear(Event::Journalled(record));
                self.running_recorded |= record == Record::Running;
            }
            _ => host.journal = None,
        }
    }
}
