//! Each rule of the layer's commit protocol, left out on purpose: the histories must notice.

use sapwood_image::layer::{Mutation, Tuning};
use sapwood_tests::sim::explore::first_failure;
use sapwood_tests::sim::layer::LayerSubject;

/// Seeds within which a breach must be noticed.
fn seeds_max(mutation: Mutation) -> u64 {
    match mutation {
        // The log of the older slot must be damaged, and must hold what the newer one has not stored: `damage` has that, too. A
        // checkpoint must end while the cleaner opens a lane and nobody writes, and the power must take that record only.
        Mutation::FallbackWithoutLog | Mutation::SlotNamesUnsynced => 20_000,
        _ => 2000,
    }
}

#[test]
fn every_breach_of_the_commit_protocol_is_noticed() {
    let mut missed = Vec::new();
    let only = std::env::var("SAPWOOD_SIM_MUTATION").ok();
    for mutation in Mutation::ALL {
        if only.as_ref().is_some_and(|only| !only.contains(&format!("{mutation:?}"))) {
            continue;
        }
        let tuning = Tuning { mutation: Some(mutation), ..Tuning::default() };
        let (tried, failure) =
            first_failure(&LayerSubject { tuning, on_device: false }, 0..seeds_max(mutation));
        match failure {
            Some(failure) => println!("{mutation:?}: seed {}, {}", tried - 1, failure.message),
            None => missed.push(mutation),
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
