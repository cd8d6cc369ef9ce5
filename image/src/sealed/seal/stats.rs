//! What sealing counts, and who watches it.

/// Counts of a seal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SealStats {
    /// Blocks of the disk.
    pub blocks_total: u64,
    /// How many of them have been read, or needed no reading.
    pub blocks_done: u64,
    /// Blocks read.
    pub blocks_read: u64,
    /// Of these, zeroes.
    pub zero: u64,
    /// Of these, blocks that were in the base, stored already, or met before.
    pub duplicate: u64,
    /// Of these, blocks that were stored.
    pub unique: u64,
    /// Bytes of records that hold them.
    pub stored_bytes: u64,
    /// Nodes stored.
    pub nodes: u64,
    /// Bytes of records that hold them.
    pub node_bytes: u64,
    /// Nodes of the base that were read.
    pub base_nodes_read: u64,
}

impl SealStats {
    /// Adds what a seal counted that went on where this one was stopped.
    pub fn add(&mut self, later: &Self) {
        // Of these, every seal counts all of the disk.
        self.blocks_total = later.blocks_total;
        self.blocks_done = later.blocks_done;
        self.blocks_read += later.blocks_read;
        self.zero += later.zero;
        self.duplicate += later.duplicate;
        self.unique += later.unique;
        self.stored_bytes += later.stored_bytes;
        self.nodes += later.nodes;
        self.node_bytes += later.node_bytes;
        self.base_nodes_read += later.base_nodes_read;
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go on.
    Go,
    /// Stop here, with what there is.
    Stop,
    /// Give up, and leave nothing behind.
    Cancel,
}

/// Is asked before each segment: shows progress, slows sealing down, stops it.
pub trait Watch {
    /// What to do, after as long a pause as shall be.
    fn between(&mut self, stats: &SealStats) -> impl Future<Output = Step>;
}

impl<F: FnMut(&SealStats) -> Step> Watch for F {
    async fn between(&mut self, stats: &SealStats) -> Step {
        self(stats)
    }
}
