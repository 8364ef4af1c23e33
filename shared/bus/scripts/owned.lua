-- List which entries are the consumer's.
-- KEYS: stream
-- ARGV: consumer group, consumer, entry id...
-- Returns {entry id...}.
-- requires: ours
local mine = {} for i = 3, #ARGV do if ours(ARGV[i]) then mine[#mine + 1] = ARGV[i] end end return mine
