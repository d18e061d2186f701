//! Texts to embeddings, with a model as it is: no tape, no dropout.

/// What a text is to the model. It decides the prompt and the longest length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Something asked.
    Query,
    /// Something that may answer.
    Document,
    /// Neither: one of two texts that are compared.
    Text,
}
