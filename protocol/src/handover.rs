//! The handover: the protocol that passes the ownership of a guest from one host to the other.
//!
//! Each host has a role. [`Source`] is the host that has the guest, and [`Destination`] is the host that is to
//! get it. Each is a plain state machine: the daemon tells it what happened ([`Event`]), and does what it returns
//! ([`Action`]).
//!
//! ```text
//! source                                   destination
//! Offer            ----------------------> check, reserve resources
//!                  <---------------------- Accept
//! copy
//! journal Leaving
//! pause, send the last pages               load the state, journal Prepared
//!                  <---------------------- Ready
//! relinquish the VMM
//! journal Committed       (the one moment at which ownership changes hands)
//! Commit           ----------------------> journal Running
//!                                          resume the guest
//!                  <---------------------- Running
//! journal Finished
//! Done             ----------------------> forget
//! discard the VMM, forget
//! ```
//!
//! It is a two-phase commit with presumed abort. The source is the coordinator and one of the two participants:
//!
//! - Until `Committed` is durable, the source owns the guest, and every failure ends with the guest running there.
//!   A migration without a record, or with `Leaving` alone, was never committed. But this alone does not permit the
//!   source to resume a VMM that has been relinquished.
//! - From `Ready` on, the destination is in doubt. It neither runs the guest nor forgets it. It repeats `Ready`,
//!   which is also a question, until it receives `Commit` or `Abort`. `Prepared` is durable by then. It is written while the
//!   VMM loads the state: a destination that is restarted meanwhile finds the record and a VMM that has not loaded
//!   everything, and promises that the guest never ran there.
//! - From `Committed` on, the source is bound. It repeats `Commit` until it learns what has become of the guest. Only
//!   `Declined` gives the guest back: it is the destination's durable promise that the guest has never run there and
//!   never will.
//!
//! Messages before `Ready` belong to one connection, and the loss of that connection fails the migration. So only
//! `Ready`, `Commit` and their answers are ever repeated (on [`Event::Tick`]). Messages may be lost, doubled, or
//! overtake each other.
//!
//! # States
//!
//! The names are those of the states in `source.rs` and `destination.rs`. Errors and repeated messages are left out.
//!
//! ```text
//! source
//!
//! Offering -> Copying -> Leaving -> Pausing -> Paused -> Relinquishing -> Committing -> Committed
//!    |           |          |          |          |            |                          |  |  |
//!    +-----------+----------+----------+----------+------------+        Declined          |  |  | Fetching
//!                           | any failure                   TakingBack <------------------+  |  v
//!                           v                                   |                    Running |  Serving
//!                       Returning <-----------------------------+                            v  v
//!                           |                                                            Finishing
//!                           v                                                                |
//!                         Kept  (the guest runs here)             (it is passed on)  Gone <- Discarding
//!
//! restart: Leaving -> Unsure -(the VMM waits)-> Asking -> Serving, Finishing or TakingBack
//!
//! destination
//!
//! Accepting -> Receiving -> Loading (-> Preparing) -> Prepared -> Starting -> Resuming -> Running -> Finished
//!     |            |           |                         |  |        |          |  |        ^
//!     +------------+-----------+                   Abort |  |        |          |  v        |
//!           | any failure          +---------------------+  +--------+----------+ Fetching -+
//!           v                      v              | it never ran        |
//!       Discarded <----------- Discarding         v                     v
//!           ^                                 Declining               Lost -> Finished
//!           +---------- Declined <---------------+
//!
//! restart: Prepared -> Unsure -(the VMM waits)-> Prepared
//!                             -(it was loading)-> Declining
//!                             -(the VMM runs)--> Unrecorded -> Resuming
//! ```
//!
//! # A host that is in doubt
//!
//! `Leaving` is written while the guest still runs. So a source that crashes afterwards, and finds its VMM
//! relinquished, knows which host to ask. It cannot conclude anything from its own journal, because a journal may be
//! damaged. It asks the destination to [`Withdraw`](Message::Withdraw), and takes the guest back only when the
//! destination has `Declined` durably. The source does the same with a relinquished VMM that its journal does not
//! know; the VMM itself names the migration then. A destination takes a loaded VMM that its journal does not know for
//! `Prepared`. For the same reason, a source that keeps a guest which it has begun to relinquish resumes the guest
//! first and sends `Abort` afterwards: the destination forgets the migration at that message, and could not be asked
//! any more.
//!
//! A destination that does not know the migration answers [`Unknown`](Message::Unknown), which permits nothing. If the
//! other host never answers, or answers so, only an operator knows more ([`Event::Resolved`]). It is safe to run the
//! guest if what the operator promises is true: the other host's VMM of this guest has ended, and stays so.
//!
//! A VMM that lives is asked before anything is promised for it. A destination whose VMM runs the guest believes the
//! VMM, whatever the journal has lost.
//!
//! A damaged journal can still do the following, and no answer can mend it:
//!
//! - A source that has lost `Committed` answers `Ready` with `Abort` before it has seen its VMM again. Then the guest
//!   is in doubt at the source until an operator resolves it, and it is gone if that VMM has ended as well.
//! - A destination that has lost its promise `Declined` before its VMM was discarded may be told to run what the source
//!   has taken back, by a `Commit` that was on its way for all that time. A destination that has lost it after
//!   `Running`, because its VMM could not start the guest, answers `Lost` for a guest that the source still has.
//! - A destination that has lost its journal while the guest fetches does not fetch any more, and an operator ends both.
//! - A destination that has lost `Running`, and whose VMM has ended as well, promises that the guest has never run. The
//!   source continues from where the guest was paused, as after a crash of a host that is restored from a snapshot. (A
//!   source that has received `Fetching` knows better, and takes the guest for lost.) The daemon's journal cannot lose
//!   its last record without being noticed; only an older copy of it, put in its place by somebody, can do this.
//! - The same copy, with a VMM that runs the guest but hangs for 10 s and cannot be ended, gives the guest two owners.
//!   The daemon reports such a VMM as gone if it was prepared to fetch, so that the source's guest does not wait for it.
//!
//! # Post-copy
//!
//! The destination may resume the guest while part of its memory is still at the source:
//!
//! ```text
//! source                                   destination
//! Commit           ----------------------> journal Running
//!                                          resume the guest, with pages missing
//!                  <---------------------- Fetching
//! serve pages      ======================> place them
//!                                          the last page is here
//!                  <---------------------- Running
//! journal Finished, and so on as above
//! ```
//!
//! The guest changes hands as in every migration, so post-copy needs no new record: `Committed` forbids the source to
//! run the guest or to forget it, and the memory of a VMM that only waits does not change. A restarted source finds
//! `Committed`, repeats `Commit`, receives `Fetching` and serves again. A restarted destination finds `Running` and
//! tells the VMM to resume, which shows whether pages are missing. So the guest survives the loss of connections and
//! daemons.
//!
//! The guest is lost if its VMM, the memory at the source, or the knowledge of what is missing is gone before the last
//! page has come: then it is whole at neither host, because the source's copy is out of date. The destination answers
//! `Lost`, and both hosts report [`Outcome::Lost`]. They do the same when an operator no longer waits for a host that
//! will not come back ([`Event::Abandoned`]). A source that has given up answers `Fetching` with `Gone`. A guest that shuts
//! itself down is not lost: what it lacks it needs no more, and the destination says `Running`, with [`POWERED_OFF`].
//!
//! A VMM may be unable to answer its daemon while it waits for a missing page. A restarted destination, which finds
//! `Running`, cannot learn then whether the guest runs, and so does not say `Fetching`. If it knows what is missing, it says
//! `Recovering`. The source serves, and takes nothing for granted: with the page that it waits for, the VMM answers, and the
//! guest either runs (`Fetching`), or has never run and cannot (`Declined`), and the source takes it back.
//!
//! # What a VMM must do
//!
//! Daemons may crash and come back while VMMs live on, so both VMMs have a part in the protocol:
//!
//! - At the source, a paused VMM that loses its daemon resumes by itself, *unless* it has been relinquished. A
//!   relinquished VMM waits until the daemon comes back and decides. (Stock QEMU does not know of daemons and always
//!   waits.)
//! - At the destination, an incoming VMM never runs the guest before it is told to.
//!
//! # What the daemon must do
//!
//! The daemon starts the actions of one call in order. Journal actions take effect in the order in which they were
//! asked for, and so do the commands to a VMM. Nothing relies on an order between a journal action, a command and a
//! message. One machine serves one migration. The identity of a migration is never used again, and the journal, the
//! messages and the commands to a VMM carry it beside what is defined here. Once [`is_over`](Source::is_over), the
//! machine may be dropped. Messages for a migration that has no machine are answered with [`Source::answer_unknown`]
//! and [`Destination::answer_unknown`].
//!
//! In post-copy, the destination's daemon must be able to tell, after a crash at any moment, whether a guest has all of
//! its memory. So the VMM must be left in a state that shows it before the daemon says [`Event::Complete`] or
//! [`Event::Abandoned`]. A daemon that does not know *which* pages are missing must not guess: a missing page that is
//! taken for a present one would be read as zeros. After [`Outcome::Lost`], a guest that still runs there must fail
//! when it touches a missing page.
//!
//! `tests/handover_model.rs` walks every reachable state of this protocol, with losses, crashes and failing VMMs at
//! every step.

mod action;
mod destination;
mod event;
mod message;
mod outcome;
mod record;
mod source;

pub use action::Action;
pub use destination::Destination;
pub use event::{Event, Resolution};
pub use message::{Message, POWERED_OFF};
pub use outcome::{Outcome, Phase};
pub use record::{Record, UnknownRecord, WrongRecord};
pub use source::Source;

#[cfg(test)]
mod tests;
