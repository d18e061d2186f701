//! Losses: embeddings in, the loss and its gradient out. They know neither encoders nor ranks.

mod infonce;

pub use infonce::InfoNce;
