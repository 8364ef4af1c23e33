-- End entries whose requests have said their last word in the tokens stream, and note it in their records: one that has
-- no entry any more and does not say so was lost.
-- KEYS: stream, record...
-- ARGV: consumer group, consumer, entry id...
-- requires: entries
-- requires: typed
for i = 3, #ARGV do
  if owns(ARGV[i]) then
    ack(ARGV[i])
    if is_a('hash', KEYS[i - 1]) then redis.call('HSET', KEYS[i - 1], 'over', '1') end
  end
end
