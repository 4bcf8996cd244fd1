//! The two sides of the handover, as far as the engine treats them alike.

use memlane_protocol::handover::{Action, Destination, Event, Source};

/// One side of the handover: decides, and does nothing.
pub trait Machine {
    /// Takes an event and says what to do.
    fn on(&mut self, event: Event) -> Vec<Action>;
    /// Whether nothing is left to do.
    fn is_over(&self) -> bool;
    /// Whether cancelling would be heeded.
    fn can_cancel(&self) -> bool;
    /// Whether an operator may give up the guest's missing pages.
    fn can_abandon(&self) -> bool;
    /// Whether the guest is in doubt, so that an operator may decide.
    fn can_resolve(&self) -> bool;
}

impl Machine for Source {
    fn on(&mut self, event: Event) -> Vec<Action> {
        Source::on(self, event)
    }

    fn is_over(&self) -> bool {
        Source::is_over(self)
    }

    fn can_cancel(&self) -> bool {
        Source::can_cancel(self)
    }

    fn can_abandon(&self) -> bool {
        Source::can_abandon(self)
    }

    fn can_resolve(&self) -> bool {
        Source::can_resolve(self)
    }
}

impl Machine for Destination {
    fn on(&mut self, event: Event) -> Vec<Action> {
        Destination::on(self, event)
    }

    fn is_over(&self) -> bool {
        Destination::is_over(self)
    }

    fn can_cancel(&self) -> bool {
        false // it is cancelled at the source
    }

    fn can_abandon(&self) -> bool {
        Destination::can_abandon(self)
    }

    fn can_resolve(&self) -> bool {
        Destination::can_resolve(self)
    }
}
