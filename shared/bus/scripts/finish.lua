-- End entries whose requests have said their last word in the tokens stream, and note it in their records: one that has
-- no entry any more and does not say so was lost.
-- KEYS: stream, record...
-- ARGV: consumer group, consumer, (entry id, tokens of the answer, or empty where no tenant is charged)...
-- requires: entries
-- requires: typed
-- requires: turns
for i = 3, #ARGV, 2 do
  local record = KEYS[(i + 1) / 2]
  if owns(ARGV[i]) then
    ack(ARGV[i])
    if is_a('hash', record) then redis.call('HSET', record, 'over', '1') end
    if ARGV[i + 1] ~= '' then settle(record, tonumber(ARGV[i + 1])) end
  end
end
