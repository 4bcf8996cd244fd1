//! Post-copy: the guest runs at the destination, and lacks part of its memory.

use super::*;

/// A VMM that hangs at a missing page may have run the guest, or not: only with the page does it say so.
#[test]
fn memory_is_served_before_it_is_known_whether_the_guest_runs() {
    let (mut destination, _) = Destination::recover(Some(Record::Running)).expect("its record");
    assert_eq!(destination.on(Event::MemoryFound), [Action::Send(Message::Recovering)]);
    assert_eq!(destination.on(Event::MemoryFound), [Action::Send(Message::Recovering)]);
    assert!(destination.phase() == Phase::Committing && destination.can_abandon());
    let (mut source, _) = Source::recover(Some(Record::Committed)).expect("its record");
    assert_eq!(source.on(Event::Message(Message::Recovering)), [Action::Serve]);
    assert_eq!(source.on(Event::Message(Message::Recovering)), []);
    assert!(source.phase() == Phase::Committing && source.can_resolve() && !source.can_abandon());

    let (mut runs, mut serves) = (destination, source);
    assert_eq!(runs.on(Event::ResumedIncomplete), [Action::Send(Message::Fetching)]);
    assert_eq!(serves.on(Event::Message(Message::Fetching)), [Action::Serve]);
    assert!(serves.phase() == Phase::Fetching && serves.can_abandon());

    let (mut never_ran, mut takes_back) = (destination, source);
    assert_eq!(never_ran.on(Event::ResumeFailed), [Action::Journal(Record::Declined)]);
    assert_eq!(takes_back.on(Event::Message(Message::Declined)), [Action::Journal(Record::TakenBack)]);

    let lost = [Action::Send(Message::Lost), Action::Discard, Action::Report(Outcome::Lost)];
    assert_eq!(destination.on(Event::Message(Message::Gone)), lost, "it would hang for ever");
    assert_eq!(Source::answer_unknown(Message::Recovering), Some(Message::Gone));
}

#[test]
fn the_memory_stays_until_the_last_page_is_there() {
    let (mut source, mut destination) = (serving(), fetching());
    for event in [
        Event::Tick,
        Event::PeerLost,
        Event::Failed,
        Event::VmmGone,
        Event::Cancel,
        Event::Message(Message::Ready),
        Event::Message(Message::Fetching),
        Event::Message(Message::Abort),
    ] {
        assert_eq!(source.on(event), [], "{event:?}");
    }
    for event in [Event::PeerLost, Event::Failed, Event::Message(Message::Done)] {
        assert_eq!(destination.on(event), [], "{event:?}");
    }
    for event in [Event::Tick, Event::Message(Message::Commit)] {
        assert_eq!(destination.on(event), [Action::Send(Message::Fetching)]);
    }
    assert_eq!(
        destination.on(Event::Complete),
        [Action::Send(Message::Running), Action::Report(Outcome::Completed)]
    );
    assert_eq!(source.on(Event::Message(Message::Running)), [Action::Journal(Record::Finished)]);
    assert_eq!(source.on(Event::Message(Message::Fetching)), [], "not before it is durable");
    assert_eq!(
        source.on(Event::Journalled(Record::Finished)),
        [Action::Send(Message::Done), Action::Discard, Action::Report(Outcome::Completed)]
    );
}

#[test]
fn what_is_lost_is_reported_as_lost_by_both() {
    let lost = [Action::Send(Message::Lost), Action::Report(Outcome::Lost)];
    for event in [Event::VmmGone, Event::Abandoned, Event::Message(Message::Gone)] {
        let mut destination = fetching();
        assert_eq!(destination.on(event), lost);
        assert_eq!(destination.on(Event::Complete), [], "too late");
        assert_eq!(destination.on(Event::Message(Message::Commit)), lost[..1]);
        assert_eq!(destination.on(Event::Message(Message::Done)), [Action::Forget]);
    }
    let (mut unsure, _) = Destination::recover(Some(Record::Running)).expect("its record");
    assert_eq!(unsure.on(Event::Abandoned), lost);

    let (restarted, _) = Source::recover(Some(Record::Committed)).expect("its record");
    for (mut source, event) in [
        (restarted, Event::Message(Message::Lost)),
        (serving(), Event::Message(Message::Lost)),
        (serving(), Event::Message(Message::Declined)),
        (serving(), Event::Abandoned),
    ] {
        assert_eq!(source.on(event), [Action::Journal(Record::Lost)]);
        assert_eq!(
            source.on(Event::Journalled(Record::Lost)),
            [Action::Send(Message::Done), Action::Discard, Action::Report(Outcome::Lost)]
        );
        assert_eq!(source.on(Event::Message(Message::Fetching)), [Action::Send(Message::Gone)]);
        assert_eq!(source.on(Event::Message(Message::Lost)), [Action::Send(Message::Done)]);
    }
}
