//! The engine treats the two sides of the handover alike, through this trait.

use memlane_protocol::handover::{Action, Destination, Event, Phase, Source};

/// One side of the handover, which decides and does nothing.
pub(crate) trait Machine {
    /// Takes an event. Returns what to do.
    fn on(&mut self, event: Event) -> Vec<Action>;
    /// Returns how far it is.
    fn phase(&self) -> Phase;
    /// Tells whether nothing is left to do.
    fn is_over(&self) -> bool;
    /// Tells whether cancelling would have an effect now.
    fn can_cancel(&self) -> bool;
    /// Tells whether an operator may give up the guest's missing pages.
    fn can_abandon(&self) -> bool;
    /// Tells whether the guest is in doubt, so that an operator may decide.
    fn can_resolve(&self) -> bool;
}

impl Machine for Source {
    fn on(&mut self, event: Event) -> Vec<Action> {
        Source::on(self, event)
    }

    fn phase(&self) -> Phase {
        Source::phase(self)
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

    fn phase(&self) -> Phase {
        Destination::phase(self)
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
