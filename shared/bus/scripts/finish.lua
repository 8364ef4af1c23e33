-- Ack and delete the entries that are still the consumer's.
-- KEYS: stream
-- ARGV: consumer group, consumer, entry id...
-- requires: ours
for i = 3, #ARGV do if ours(ARGV[i]) then let_go(ARGV[i]) end end
