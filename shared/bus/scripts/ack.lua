-- Ack and delete those entries that the consumer still owns.
-- KEYS: stream
-- ARGV: consumer group, consumer, entry id...
-- requires: entries
for i = 3, #ARGV do if owns(ARGV[i]) then ack(ARGV[i]) end end
